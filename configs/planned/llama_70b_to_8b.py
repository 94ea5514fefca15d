"""Llama-3.1-70B teaches a model of the size of Llama-3.1-8B: planned before a chip is rented.

What     A teacher of 70.6 billion parameters over all devices, beside a student of 8.0 billion that learns its scores
         of a text: 1,048,576 tokens a step in bfloat16, with master weights and moments in float32.
Why      Grattafiori et al. 2024 (Llama 3.1); Hinton et al. 2015; Muralidharan et al. 2024 (Minitron) for distillation
         at this size.
Command  epigone plan configs/planned/llama_70b_to_8b.py
         epigone plan configs/planned/llama_70b_to_8b.py --topology h100:64 --search
         epigone run configs/planned/llama_70b_to_8b.py --teacher FOLDER   (on the devices)
Cost     docs/scale.md has the plans.
Expect   A plan that fits. Nothing was trained: there is no claim about the student.
"""

from dataclasses import replace as change
from typing import Any

from epigone.data.corpora import Tfds
from epigone.interchange.huggingface import read_config
from epigone.lessons.divergences import forward_kl
from epigone.lessons.objective import Objective
from epigone.lineage import Evaluation, Lesson, Lineage, Node, Text
from epigone.models.layers import save_nothing
from epigone.pretrained import published
from epigone.training.loop import Hardware, Training
from epigone.training.optimizer import Optimizer

TOPOLOGY = "v5p-256"
HARDWARE = Hardware(fsdp=64, tensor=2, microbatches=2)

TEXT = Tfds("wiki40b/en")
BATCH, LENGTH = 256, 4096

SMALL = {
    "model_type": "llama",
    "_name_or_path": "meta-llama/Llama-3.1-8B",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}
LARGE = SMALL | {
    "_name_or_path": "meta-llama/Llama-3.1-70B",
    "hidden_size": 8192,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "intermediate_size": 28672,
}


def lineage(teacher: str = "", tokens: int = 2_000_000_000, passes: int = 1) -> Lineage:
    """The teacher, and a student of it from a fresh start.

    Args:
        teacher: folder with the weights of the teacher; without it the lineage can be planned, and not run.
        tokens: tokens of the text.
        passes: how often the student reads them.
    """
    return distilled("llama-70b-to-8b", LARGE, SMALL, teacher, tokens, passes, __doc__)


def distilled(
    name: str, large: dict[str, Any], small: dict[str, Any], teacher: str, tokens: int, passes: int, about: str | None
) -> Lineage:
    """A published model, and a fresh student of another's shape, which learns its scores of a text."""
    parent = published(large, "teacher", teacher, role="teacher")
    config = change(read_config(small), dtype="bfloat16", remat=save_nothing)
    training = Training(
        steps=max(1, passes * tokens // (BATCH * LENGTH)),
        batch_size=BATCH,
        sequence_length=LENGTH,
        optimizer=Optimizer(learning_rate=3e-4, warmup_steps=200),
        compare_every=None,
    )
    lesson = Lesson(
        (Text(TEXT, tokens=tokens),), teacher=parent.key, objective=Objective(forward_kl), training=training
    )
    student = Node("student", 1, config, parent.tokenizer, lesson, labels={"role": "student"})
    evaluation = Evaluation(
        text=Text(TEXT, split="test", tokens=1_000_000), real=Text(TEXT, tokens=10_000_000), write_tokens=0
    )
    return Lineage(name, (parent, student), evaluation, (about or "").partition("\n")[0])
