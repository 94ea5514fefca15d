"""The step of training lowers on a CPU for platforms that are not here."""

from contextlib import contextmanager
from dataclasses import replace

import jax
import pytest
from jax._src.cudnn import fused_attention_stablehlo
from jax._src.mesh import AbstractDevice
from jax.sharding import AbstractMesh, AxisType

from epigone.errors import UserError
from epigone.lessons import chunks, fused
from epigone.lessons.divergences import forward_kl, reverse_kl
from epigone.lessons.inner import Match
from epigone.lessons.match_kinds import States
from epigone.lessons.objective import TEXT_ALONE, Objective
from epigone.models import attention, decoder, experts
from epigone.models.adapters import LowRank
from epigone.models.config import DecoderConfig
from epigone.models.rules import Sharding
from epigone.models.sharding import AXES, make_mesh
from epigone.teachers.in_memory import DecoderTeacher
from epigone.training.ahead import traced_step
from epigone.training.config import Hardware, Training
from epigone.training.student import Student

STUDENT = DecoderConfig(vocab_size=512, layers=2, model_size=64, heads=4, kv_heads=2, head_size=64, dtype="bfloat16")
WINDOWS = replace(STUDENT, window=64, window_pattern=(True, False), attention_softcap=50.0)
EXPERTS = replace(STUDENT, experts=4)
TEACHER = replace(STUDENT, layers=3, model_size=128)
COPIES = Sharding(B=AXES, N=(), K=(), F=(), V=(), D=())
OVER_ALL = Sharding(D=("data", "fsdp"))
KINDS = {"tpu": "TPU v5", "cuda": "NVIDIA H100 80GB HBM3", "cpu": "cpu"}


def exported(
    platform,
    *,
    student=STUDENT,
    objective=Objective(forward_kl),
    rules=Sharding(),
    batch=16,
    offload=False,
    sizes=(2, 2, 2, 1),
    **parts,
):
    """The StableHLO of a step on eight devices of a platform, from a machine that has none of them."""
    training = Training(batch_size=batch, sequence_length=128)
    teacher = DecoderTeacher(TEACHER, None, "id", sharding=OVER_ALL) if objective != TEXT_ALONE else None
    hardware = Hardware(*sizes, student=rules, teacher=OVER_ALL, offload_optimizer=offload)
    with meshed(platform, sizes):
        step = traced_step(Student(student, sharding=rules, **parts), training, objective, teacher, hardware)
        return step.lower(lowering_platforms=(platform,)).as_text()


@contextmanager
def meshed(platform, sizes):
    """A mesh of devices that are not here. JAX lowers cuDNN's kernels for concrete devices alone: virtual ones will do,
    and its version, which is asked for then."""
    device = AbstractDevice(device_kind=KINDS[platform], num_cores=None, platform=platform)
    if platform != "cuda":
        with jax.sharding.use_abstract_mesh(
            AbstractMesh(sizes, AXES, axis_types=(AxisType.Explicit,) * 4, abstract_device=device)
        ):
            yield
        return
    with pytest.MonkeyPatch.context() as patch, jax.set_mesh(make_mesh(*sizes)):
        patch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
        for user in (attention, experts, decoder, chunks, fused):
            patch.setattr(user, "platform_in_use", lambda: platform)
        yield


PATHS = {
    "text": {"objective": TEXT_ALONE},
    "scores": {},
    "whole student": {"rules": COPIES},
    "windows, a soft cap": {"student": WINDOWS, "objective": Objective(reverse_kl)},
    "experts": {"student": EXPERTS},
    "experts apart": {"student": EXPERTS, "sizes": (1, 2, 2, 2)},
    "adapters": {"adapters": LowRank(rank=4)},
    "inside": {"objective": Objective(forward_kl, inner=(Match(States()),))},
    "offload": {"offload": True},
    "remat": {"student": replace(STUDENT, remat=jax.checkpoint_policies.nothing_saveable)},
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_every_path_lowers_for_devices_that_are_not_here(platform, path):
    text = exported(platform, **PATHS[path])
    assert "num_partitions = 8" in text
    assert {"tpu": "tpu_custom_call", "cuda": "__cudnn$fmha"}[platform] in text


def test_where_no_kernel_fits_there_is_none():
    capped = exported("cuda", student=WINDOWS, objective=TEXT_ALONE)
    assert "cudnn" not in capped
    assert "custom_call" not in exported("cpu", objective=TEXT_ALONE).replace("@Sharding", "")


def test_what_does_not_divide_is_refused_before_it_is_lowered():
    with pytest.raises(UserError, match="batch_size 6 does not divide into 1 micro-batches over 4 devices"):
        exported("tpu", batch=6)
    with pytest.raises(UserError, match="axis N has size 3, which tensor = 2 does not divide"):
        exported("tpu", student=replace(STUDENT, heads=3, kv_heads=3))
