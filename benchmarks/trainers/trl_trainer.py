"""TRL's own trainer for distillation, with the models of transformers. Its loss is the KL alone, at temperature 1."""

import tempfile
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from trainers.work import LEARNING_RATE, TEMPERATURE, WEIGHT_DECAY, Answers, Work


def serve(work: Work, answers: Answers) -> None:
    """Steps on one constant batch."""
    import transformers
    from datasets import Dataset
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    torch.set_num_threads(work.threads)
    tokens = torch.from_numpy(work.rows(work.sizes("student")["vocab_size"])).long()
    labels = tokens.clone()
    labels[:, 0] = -100  # a prompt of one token: the targets are those of the others
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}
    arguments = GKDConfig(
        output_dir=tempfile.mkdtemp(dir=work.folder),
        per_device_train_batch_size=work.batch_size,
        learning_rate=LEARNING_RATE,
        weight_decay=WEIGHT_DECAY,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        max_steps=10**6,
        optim="adamw_torch_fused",
        lmbda=0.0,  # no texts of the student
        beta=0.0,  # forward KL
        temperature=TEMPERATURE,  # which its loss does not read
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )

    class Told(GKDTrainer):
        """Keeps its last loss."""

        def training_step(self, *given: Any, **named: Any) -> torch.Tensor:
            self.last = super().training_step(*given, **named)
            return self.last

    class Asked(transformers.TrainerCallback):
        """Waits after each step."""

        def on_step_end(self, *given: Any, **named: Any) -> None:
            answers.done(float(trainer.last))

    load = transformers.AutoModelForCausalLM.from_pretrained
    teacher, student = (load(work.folder / role, dtype=torch.float32) for role in ("teacher", "student"))
    trainer = Told(
        model=student,
        teacher_model=teacher,
        args=arguments,
        data_collator=lambda _: dict(batch),
        train_dataset=Dataset.from_dict({"input_ids": tokens.repeat(64, 1).tolist()}),
        processing_class=empty_tokenizer(),
        callbacks=[Asked()],
    )
    answers.ready()
    trainer.train()


def empty_tokenizer() -> Any:
    """A tokenizer, which the trainer wants to have and does not use."""
    import transformers

    words = Tokenizer(WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2}, unk_token="<pad>"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>")
