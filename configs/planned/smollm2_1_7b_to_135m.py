"""SmolLM2-1.7B teaches a model of the size of SmolLM2-135M: planned before a chip is rented.

What     A teacher of 1.7 billion parameters and a student of 135 million on eight devices: a node of GPUs, or eight
         chips.
Why      Allal et al. 2025 (SmolLM2); Hinton et al. 2015.
Command  epigone plan configs/planned/smollm2_1_7b_to_135m.py
         epigone run configs/planned/smollm2_1_7b_to_135m.py --teacher FOLDER   (on the devices)
Cost     docs/scale.md has the plan.
Expect   A plan that fits. Nothing was trained: there is no claim about the student.
"""

from llama_70b_to_8b import distilled

from epigone.lineage import Lineage
from epigone.training.loop import Hardware

TOPOLOGY = "v5e-8"
HARDWARE = Hardware(fsdp=8, microbatches=8)

SMALL = {
    "model_type": "llama",
    "_name_or_path": "HuggingFaceTB/SmolLM2-135M",
    "vocab_size": 49152,
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 1536,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000.0,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
}
LARGE = SMALL | {
    "_name_or_path": "HuggingFaceTB/SmolLM2-1.7B",
    "hidden_size": 2048,
    "num_hidden_layers": 24,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "intermediate_size": 8192,
    "rope_theta": 130000.0,
}


def lineage(teacher: str = "", tokens: int = 2_000_000_000, passes: int = 4) -> Lineage:
    """The teacher, and a student of it from a fresh start.

    Args:
        teacher: folder with the weights of the teacher; without it the lineage can be planned, and not run.
        tokens: tokens of the text.
        passes: how often the student reads them.
    """
    return distilled("smollm2-1.7b-to-135m", LARGE, SMALL, teacher, tokens, passes, __doc__)
