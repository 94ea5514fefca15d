"""Plain loops in PyTorch: a lean Llama or that of transformers, with TRL's loss or Liger's chunked one."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from alternating import liger_loss
from safetensors.torch import load_file
from torch import nn

from trainers.work import HARD_WEIGHT, LEARNING_RATE, TEMPERATURE, WEIGHT_DECAY, Answers, Work, fastest_product

Loss = Callable[..., torch.Tensor]
"""(student's states and head, teacher's states and head, targets) -> the mean loss."""


class Lean(nn.Module):
    """A Llama in few lines, its head tied to the embeddings; weights under the names of transformers."""

    def __init__(self, work: Work, role: str) -> None:
        super().__init__()
        config, weights = work.sizes(role), load_file(work.folder / role / "model.safetensors")
        self.layers, self.heads = config["num_hidden_layers"], config["num_attention_heads"]
        self.epsilon, self.theta = config["rms_norm_eps"], theta_of(config)
        self.weights = nn.ParameterDict(
            {name.removeprefix("model.").replace(".", "/"): nn.Parameter(w) for name, w in weights.items()}
        )

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """States [B T, D] after the final norm, and the head [V, D]."""
        (B, T), get = tokens.shape, self.weights.__getitem__
        x = F.embedding(tokens, get("embed_tokens/weight"))
        size = x.shape[-1] // self.heads
        turns = torch.arange(T)[:, None] * self.theta ** (-torch.arange(0, size, 2) / size)
        cos, sin = torch.cat([turns.cos()] * 2, -1), torch.cat([-turns.sin(), turns.sin()], -1)

        def split(y: torch.Tensor) -> torch.Tensor:
            return y.view(B, T, self.heads, size).transpose(1, 2)

        def rotate(y: torch.Tensor) -> torch.Tensor:
            return y * cos + y.roll(size // 2, -1) * sin

        for i in range(self.layers):
            own = {name: get(f"layers/{i}/{name.replace('.', '/')}/weight") for name in NAMES}
            y = F.rms_norm(x, x.shape[-1:], own["input_layernorm"], self.epsilon)
            q, k, v = (split(F.linear(y, own[f"self_attn.{one}_proj"])) for one in "qkv")
            mixed = F.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
            x = x + F.linear(mixed.transpose(1, 2).reshape(B, T, -1), own["self_attn.o_proj"])
            y = F.rms_norm(x, x.shape[-1:], own["post_attention_layernorm"], self.epsilon)
            y = F.silu(F.linear(y, own["mlp.gate_proj"])) * F.linear(y, own["mlp.up_proj"])
            x = x + F.linear(y, own["mlp.down_proj"])
        states = F.rms_norm(x, x.shape[-1:], get("norm/weight"), self.epsilon)
        return states.flatten(0, 1), get("embed_tokens/weight")


NAMES = [f"self_attn.{one}_proj" for one in "qkvo"] + [f"mlp.{one}_proj" for one in ("gate", "up", "down")]
NAMES += ["input_layernorm", "post_attention_layernorm"]


def theta_of(config: dict[str, Any]) -> float:
    """The base of the rotation, wherever this version of the file has it."""
    return config.get("rope_theta") or config["rope_parameters"]["rope_theta"]


class HuggingFace(nn.Module):
    """The Llama of transformers, up to its head."""

    def __init__(self, work: Work, role: str) -> None:
        import transformers

        super().__init__()
        self.model = transformers.LlamaForCausalLM.from_pretrained(work.folder / role, dtype=torch.float32)

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """States [B T, D] after the final norm, and the head [V, D]."""
        return self.model.model(tokens, use_cache=False)[0].flatten(0, 1), self.model.lm_head.weight


def trl_loss(compiled: bool) -> Loss:
    """TRL's divergence at beta 0, forward KL, times the square of its temperature; and cross-entropy."""
    from trl.experimental.gkd import GKDTrainer

    divergence = GKDTrainer.generalized_jsd_loss

    def loss(student: Any, teacher: Any, targets: torch.Tensor) -> torch.Tensor:
        logits, known = student[0] @ student[1].T, teacher[0] @ teacher[1].T
        soft = divergence(logits, known, beta=0, temperature=TEMPERATURE, reduction="batchmean")
        return (1 - HARD_WEIGHT) * TEMPERATURE**2 * soft + HARD_WEIGHT * F.cross_entropy(logits, targets)

    return torch.compile(loss) if compiled else loss


def chunked_loss() -> Loss:
    """Liger's chunked loss; its soft part has no square of the temperature, so its weights have it."""
    soft = (1 - HARD_WEIGHT) * TEMPERATURE**2
    inner = liger_loss(weight_hard_loss=HARD_WEIGHT, weight_soft_loss=soft, beta=0.0, temperature=TEMPERATURE)
    return lambda student, teacher, targets: inner(*student, *teacher, targets)


def serve(work: Work, answers: Answers, model: Callable[[Work, str], nn.Module], loss: Loss, compiled: bool) -> None:
    """Steps of a plain loop: teacher, student, loss, gradients, AdamW in its fused form."""
    torch.set_num_threads(work.threads)
    teacher, student = model(work, "teacher").requires_grad_(False).eval(), model(work, "student").train()
    rows = torch.from_numpy(work.rows(work.sizes("student")["vocab_size"])).long()
    tokens, targets = rows[:, :-1].contiguous(), rows[:, 1:].flatten()
    optimizer = torch.optim.AdamW(student.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True)

    if compiled:
        teacher.compile()
        student.compile()

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            known = teacher(tokens)
        value = loss(student(tokens), known, targets)
        value.backward()
        optimizer.step()
        return float(value.detach())

    answers.serve(step=step)


def serve_products(work: Work, answers: Answers) -> None:
    """Matrix products of PyTorch."""
    torch.set_num_threads(work.threads)

    def make(rows: int, depth: int, columns: int) -> Callable[[], Any]:
        a, b, out = torch.ones(rows, depth), torch.ones(depth, columns), torch.empty(rows, columns)
        return lambda: torch.mm(a, b, out=out)

    answers.serve(step=fastest_product(make))
