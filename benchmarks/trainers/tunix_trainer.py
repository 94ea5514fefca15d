"""Tunix' own trainer for distillation, with its Llama."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
from tunix.distillation import distillation_trainer, strategies
from tunix.models.llama3 import model as llama
from tunix.models.llama3 import params

from trainers.work import HARD_WEIGHT, LEARNING_RATE, TEMPERATURE, WEIGHT_DECAY, Answers, Work


def serve(work: Work, answers: Answers) -> None:
    """Steps on one constant batch."""
    vocab_size = work.sizes("student")["vocab_size"]

    def forward(model: Any, input_tokens: jax.Array, input_mask: jax.Array) -> jax.Array:
        read = input_tokens[:, :-1]
        positions = jnp.broadcast_to(jnp.arange(read.shape[1]), read.shape)
        seen = jnp.tril(jnp.ones((read.shape[1],) * 2, bool))[None] & input_mask[:, None, :-1]
        return model(read, positions, None, seen)[0]

    def labels(input_tokens: jax.Array, input_mask: jax.Array) -> jax.Array:
        return jax.nn.one_hot(input_tokens[:, 1:], vocab_size)

    class Told(distillation_trainer.DistillationTrainer):
        """Keeps what its last step says."""

        def _post_process_train_step(self, aux: Any) -> None:
            self.last = aux

    strategy = strategies.LogitStrategy(forward, forward, labels, temperature=TEMPERATURE, alpha=1 - HARD_WEIGHT)
    optimizer = optax.adamw(LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    config = distillation_trainer.TrainingConfig(eval_every_n_steps=10**9)
    trainer = Told(load(work, "student"), load(work, "teacher"), strategy, optimizer, config)
    rows = jnp.asarray(work.rows(vocab_size))
    batch = distillation_trainer.TrainingInput(input_tokens=rows, input_mask=jnp.ones_like(rows, bool))

    def asked() -> Iterator[Any]:
        answers.ready()
        while True:
            yield batch
            soft, hard = (float(trainer.last[f"distill/{kind}_loss"]) for kind in ("soft", "hard"))
            answers.done((1 - HARD_WEIGHT) * soft + HARD_WEIGHT * hard)

    trainer.train(asked())


def load(work: Work, role: str) -> Any:
    """A model of Tunix with these weights."""
    given = work.sizes(role)
    config = llama.ModelConfig(
        num_layers=given["num_hidden_layers"],
        vocab_size=given["vocab_size"],
        embed_dim=given["hidden_size"],
        hidden_dim=given["intermediate_size"],
        num_heads=given["num_attention_heads"],
        head_dim=given["head_dim"],
        num_kv_heads=given["num_key_value_heads"],
        rope_theta=given["rope_theta"],
        norm_eps=given["rms_norm_eps"],
        weight_tying=given["tie_word_embeddings"],
    )
    return params.create_model_from_safe_tensors(str(work.folder / role), config, None, jnp.float32)
