"""Small students and teachers, traced and compiled on virtual devices."""

from dataclasses import replace

import jax

from epigone.lessons.divergences import forward_kl
from epigone.lessons.objective import Objective
from epigone.lineage import Lesson, Node
from epigone.models.config import DecoderConfig
from epigone.models.rules import Sharding
from epigone.models.sharding import AXES, make_mesh
from epigone.planning.steps import Step, trace
from epigone.training.config import Hardware, Training

STUDENT = DecoderConfig(vocab_size=512, layers=2, model_size=64, heads=4, kv_heads=2, max_length=128)
TEACHER = replace(STUDENT, layers=3, model_size=128)
OVER_ALL = Sharding(D=("data", "fsdp"))


def step(student=STUDENT, teacher=TEACHER, batch=16, length=128, steps=10, text=(), objective=Objective(forward_kl)):
    training = Training(steps=steps, batch_size=batch, sequence_length=length)
    lesson = Lesson(text, teacher="t@0" if teacher else None, objective=objective, training=training)
    return Step(Node("s", 1, student, None, lesson), student, (teacher,) if teacher else ())


def on_virtual_devices(what, hardware):
    """The traced step on virtual devices, and the program that XLA makes of it."""
    with jax.set_mesh(make_mesh(*hardware.sizes)):
        traced = trace(what, hardware)
        return traced, traced.lower().compile()


def sizes(hardware: Hardware):
    return dict(zip(AXES, hardware.sizes, strict=True))
