"""Qwen3-32B teaches a model of the size of Qwen3-1.7B: planned before a chip is rented.

What     A teacher of 32.8 billion parameters over 256 chips of 16 GiB, beside a student of 1.7 billion.
Why      Qwen Team 2025 (Qwen3), whose small models are distilled from large ones; Hinton et al. 2015.
Command  epigone plan configs/planned/qwen3_32b_to_1_7b.py
         epigone run configs/planned/qwen3_32b_to_1_7b.py --teacher FOLDER   (on the devices)
Cost     docs/scale.md has the plan.
Expect   A plan that fits. Nothing was trained: there is no claim about the student.
"""

from llama_70b_to_8b import distilled

from epigone.lineage import Lineage
from epigone.training.loop import Hardware

TOPOLOGY = "v5e-256"
HARDWARE = Hardware(fsdp=128, tensor=2)

SMALL = {
    "model_type": "qwen3",
    "_name_or_path": "Qwen/Qwen3-1.7B",
    "vocab_size": 151936,
    "hidden_size": 2048,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
}
LARGE = SMALL | {
    "_name_or_path": "Qwen/Qwen3-32B",
    "hidden_size": 5120,
    "num_hidden_layers": 64,
    "num_attention_heads": 64,
    "intermediate_size": 25600,
    "tie_word_embeddings": False,
}


def lineage(teacher: str = "", tokens: int = 2_000_000_000, passes: int = 1) -> Lineage:
    """The teacher, and a student of it from a fresh start.

    Args:
        teacher: folder with the weights of the teacher; without it the lineage can be planned, and not run.
        tokens: tokens of the text.
        passes: how often the student reads them.
    """
    return distilled("qwen3-32b-to-1.7b", LARGE, SMALL, teacher, tokens, passes, __doc__)
