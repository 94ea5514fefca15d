"""The fused loss beside the dense form, PyTorch's dense form and Liger's chunked loss, in one alternating run.

Forward KL at temperature 1 between two heads over one vocabulary, float32: the loss, and its gradients by the student's
hidden states and head; `--objective` takes any other, beside the dense form alone, and each size may have several
values. Before anything is timed, all must give the same loss and the same gradients. Every round times every
implementation once, in an order that rotates; what is printed are medians over the rounds, and medians and quartiles of
the ratio within a round. The dense form stands there twice: what differs between its two lines is chance. All run in
one process: the same threads, and the same settings of the C library's allocator
(src/epigone/runtime.py; EPIGONE_RUNTIME=off leaves them as they are). Temporaries are what XLA's compiled program needs
beside its arguments and results.
"""

import argparse
import os
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from epigone.runtime import prepare

prepare()  # before JAX is imported, which reads some of these settings then

# ruff: noqa: E402
import jax
import jax.numpy as jnp
import numpy as np
from alternating import in_turn, liger_loss, quartiles, seconds_of

from epigone.lessons import divergences
from epigone.lessons.fused import fused_loss
from epigone.lessons.heads import Hidden
from epigone.lessons.objective import TEXT_ALONE, Objective

NAMES = ["forward_kl", "reverse_kl", "symmetric_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "adaptive_kl"]
NAMES += ["total_variation", "alpha_beta", "logit_mse"]
OBJECTIVES = {name: Objective(getattr(divergences, name)) for name in NAMES}
OBJECTIVES |= {"cross_entropy": TEXT_ALONE, "half_hard": Objective(hard_weight=0.5)}


SIZES = {"tokens": 4096, "vocab_size": 128_256, "student": 1024, "teacher": 1024}
"""What is measured by default: one micro-batch of a large vocabulary."""


class Shape(NamedTuple):
    """Sizes of the work."""

    tokens: int
    vocab_size: int
    student: int
    teacher: int
    threads: int


class Arrays(NamedTuple):
    """Hidden states [tokens, D] and heads [V, D] of student and teacher."""

    student_TD: np.ndarray
    student_VD: np.ndarray
    teacher_TD: np.ndarray
    teacher_VD: np.ndarray


Found = tuple[float, np.ndarray, np.ndarray]
"""The mean loss, and its gradients by the student's hidden states and head."""

Job = Callable[[], Found]


def arrays(shape: Shape) -> Arrays:
    """Random ones, with logits of a spread of about 2."""
    draw = np.random.default_rng(0)
    made = [
        2 * size**-0.25 * draw.standard_normal((rows, size), np.float32)
        for size in (shape.student, shape.teacher)
        for rows in (shape.tokens, shape.vocab_size)
    ]
    return Arrays(*made)


def ours(given: Arrays, fused: bool, objective: Objective) -> tuple[Job, int]:
    """The loss of the project, fused or dense, and the bytes of its temporaries."""
    tokens = len(given.student_TD)
    targets_BT, weights_BT = jnp.arange(tokens)[None] % len(given.student_VD), jnp.full((1, tokens), 1 / tokens)

    def loss(hidden_TD: jax.Array, head_VD: jax.Array, known_TD: jax.Array, known_VD: jax.Array) -> jax.Array:
        if fused:
            student, teacher = Hidden(hidden_TD[None], head_VD), Hidden(known_TD[None], known_VD)
            return fused_loss(objective.loss, student, teacher, targets_BT, weights_BT)[0]
        logits_BTV, known_BTV = hidden_TD[None] @ head_VD.T, known_TD[None] @ known_VD.T
        return jnp.sum(objective.loss(logits_BTV, known_BTV, targets_BT) * weights_BT)

    placed = [jnp.asarray(x) for x in given]
    compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(*placed).compile()

    def job() -> Found:
        value, gradients = jax.block_until_ready(compiled(*placed))
        return float(value), *map(np.asarray, gradients)

    return job, compiled.memory_analysis().temp_size_in_bytes


def torch_dense(given: Arrays, threads: int) -> Job:
    """log_softmax and kl_div of PyTorch over all logits, compiled."""
    import torch
    import torch.nn.functional as F

    torch.set_num_threads(threads)
    student_TD, student_VD, teacher_TD, teacher_VD = (torch.from_numpy(x.copy()) for x in given)
    leaves = [student_TD.requires_grad_(), student_VD.requires_grad_()]

    @torch.compile
    def loss(student_TD, student_VD, teacher_TD, teacher_VD):
        log_s, log_p = (F.log_softmax(x, -1) for x in (student_TD @ student_VD.T, teacher_TD @ teacher_VD.T))
        return F.kl_div(log_s, log_p, reduction="batchmean", log_target=True)

    return torch_job(lambda: loss(*leaves, teacher_TD, teacher_VD), leaves)


def liger(given: Arrays, threads: int) -> Job:
    """Liger's chunked loss, compiled, in its default chunks of 1,024 tokens; beta 0 is forward KL."""
    import torch

    torch.set_num_threads(threads)
    student_TD, student_VD, teacher_TD, teacher_VD = (torch.from_numpy(x.copy()) for x in given)
    leaves, labels = [student_TD.requires_grad_(), student_VD.requires_grad_()], torch.zeros(len(student_TD), dtype=int)
    loss = liger_loss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0)
    return torch_job(lambda: loss(*leaves, teacher_TD, teacher_VD, labels), leaves)


def torch_job(loss: Callable, leaves: list) -> Job:
    """A loss of PyTorch with its gradients."""

    def job() -> Found:
        for leaf in leaves:
            leaf.grad = None
        value = loss()
        value.backward()
        return float(value.detach()), *(leaf.grad.numpy() for leaf in leaves)

    return job


def jobs_of(shape: Shape, objective: str) -> tuple[dict[str, Job], list[str]]:
    """All implementations that are installed, ours first, and lines to be told."""
    given, told = arrays(shape), []
    jobs: dict[str, Job] = {}
    for name, fused in (("fused", True), ("dense", False), ("dense again", False)):
        jobs[name], size = ours(given, fused, OBJECTIVES[objective])
        told.append(f"{name}: {size / 1e6:,.0f} MB of temporaries")
    if objective != "forward_kl":
        return jobs, told
    for name, make in (("PyTorch dense", torch_dense), ("Liger chunked", liger)):
        try:
            jobs[name] = make(given, shape.threads)
        except ModuleNotFoundError as error:
            told.append(f"left out: {name}, for {error.name} is not installed (pip install torch==2.13.0 liger-kernel)")
    return jobs, told


def check(jobs: dict[str, Job]) -> None:
    """Compile, and compare. Raises SystemExit for an implementation that computes something else."""
    wanted = jobs["fused"]()
    for name, job in jobs.items():
        for mine, theirs in zip(wanted, job(), strict=True):
            if not np.allclose(mine, theirs, rtol=1e-3, atol=1e-5 * np.abs(mine).max()):
                raise SystemExit(f"{name} computes something else")


def compare(shape: Shape, objective: str, rounds: int) -> None:
    """All implementations at one size, in turn."""
    jobs, told = jobs_of(shape, objective)
    check(jobs)
    sizes = f"{shape.tokens:,} tokens, vocabulary {shape.vocab_size:,}, D {shape.student} and {shape.teacher}"
    print(f"{objective}: {sizes}")
    print(*told, sep="\n", flush=True)
    seconds = in_turn({name: partial(seconds_of, job) for name, job in jobs.items()}, rounds)
    for name, times in seconds.items():
        low, ratio, high = quartiles(times, seconds["fused"])
        print(f"{name:<14} {np.median(times):7.3f} s   fused is faster by {ratio:.2f} ({low:.2f}-{high:.2f})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in SIZES.items():
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=int, nargs="+", default=[value], help=f"one or several; default {value}")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="default: all")
    parser.add_argument("--rounds", type=int, default=5, help="default 5")
    names = {"nargs": "+", "choices": [*OBJECTIVES, "all"], "default": ["forward_kl"]}
    parser.add_argument("--objective", **names, help="one, several or all; default forward_kl")
    given = vars(parser.parse_args())
    objectives = list(OBJECTIVES) if "all" in given["objective"] else given["objective"]
    os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[: given["threads"]]))
    for *sizes, objective in product(*(given[name] for name in SIZES), objectives):
        compare(Shape(*sizes, given["threads"]), objective, given["rounds"])


if __name__ == "__main__":
    main()
