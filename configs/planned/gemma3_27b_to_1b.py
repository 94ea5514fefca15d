"""Gemma-3-27B teaches a model of the size of Gemma-3-1B: planned before a chip is rented.

What     A teacher of 27.0 billion parameters with windows in five of six layers, beside a student of 1.0 billion; both
         with a vocabulary of 262,144.
Why      Gemma Team 2025 (Gemma 3), whose models are all distilled; Hinton et al. 2015.
Command  epigone plan configs/planned/gemma3_27b_to_1b.py
         epigone run configs/planned/gemma3_27b_to_1b.py --teacher FOLDER   (on the devices)
Cost     docs/scale.md has the plan.
Expect   A plan that fits. Nothing was trained: there is no claim about the student.
"""

from llama_70b_to_8b import distilled

from epigone.lineage import Lineage
from epigone.models.rules import Sharding
from epigone.training.loop import Hardware

TOPOLOGY = "v6e-64"
# One key and value head cannot be cut: the student is gathered, and the batch cut over all devices.
AXES = ("data", "fsdp", "tensor", "expert")
HARDWARE = Hardware(fsdp=32, tensor=2, student=Sharding(B=AXES, N=(), K=(), F=(), V=(), D=AXES))

SMALL = {
    "model_type": "gemma3_text",
    "_name_or_path": "google/gemma-3-1b-pt",
    "vocab_size": 262144,
    "hidden_size": 1152,
    "num_hidden_layers": 26,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "intermediate_size": 6912,
    "query_pre_attn_scalar": 256,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "rope_local_base_freq": 10000.0,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
}
LARGE = SMALL | {
    "_name_or_path": "google/gemma-3-27b-pt",
    "hidden_size": 5376,
    "num_hidden_layers": 62,
    "num_attention_heads": 32,
    "num_key_value_heads": 16,
    "head_dim": 128,
    "intermediate_size": 21504,
    "query_pre_attn_scalar": 168,
    "max_position_embeddings": 131072,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    "sliding_window": 1024,
}


def lineage(teacher: str = "", tokens: int = 2_000_000_000, passes: int = 1) -> Lineage:
    """The teacher, and a student of it from a fresh start.

    Args:
        teacher: folder with the weights of the teacher; without it the lineage can be planned, and not run.
        tokens: tokens of the text.
        passes: how often the student reads them.
    """
    return distilled("gemma3-27b-to-1b", LARGE, SMALL, teacher, tokens, passes, __doc__)
