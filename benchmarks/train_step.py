"""Epigone's distillation step beside PyTorch loops, TRL's trainer and Tunix, in one alternating run.

A Llama-type teacher and a smaller student read one batch; the student learns by forward KL at temperature 2 (times its
square) and cross-entropy, half and half, with AdamW, in float32. Each trainer has a process of its own, held open, with
the same weights, data, threads and allocator. Before anything is timed, the first two losses must agree to 1e-4. Every
round asks each for one step, in an order that rotates; a step is repeated, a few times at most, while other processes
use the processor too. What is printed are medians over the rounds, and medians and
quartiles of the ratio within a round; the most memory that each process has had; the time of the first step, less that
of the second, with empty caches of compilations; and the share of the machine's peak, the fastest matrix product of
PyTorch and XLA in the same rounds.

TRL's trainer computes less: the KL alone, at temperature 1, of which the first loss must be Epigone's forward KL. Peers
that are not installed are left out; a line says so.

    pip install torch==2.13.0 transformers trl==1.16.0 datasets liger-kernel==0.7.0 google-tunix==0.1.7
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from alternating import in_turn, quartiles, undisturbed
from trainers.work import Answers, Work

from epigone.runtime import prepare

OURS, REAL = "Epigone", "data"
TRL, TUNIX = "TRL, GKDTrainer", "Tunix, DistillationTrainer"
LEAN, EAGER, LIGER = "PyTorch lean, compiled", "PyTorch eager, transformers", "PyTorch lean + Liger, compiled"
PRODUCTS = ("products of XLA", "products of PyTorch")
NEEDS = {
    OURS: ("epigone",),
    **dict(zip(PRODUCTS, (("jax",), ("torch",)), strict=True)),
    LEAN: ("torch", "trl", "transformers"),
    LIGER: ("torch", "liger_kernel"),
    EAGER: ("torch", "trl", "transformers"),
    TRL: ("torch", "trl", "transformers", "datasets"),
    TUNIX: ("tunix",),
}
"""Every process, and the packages that it needs."""

LARGE = (EAGER, TRL, TUNIX)
"""Those that need so much memory that they are held open one at a time, each in a sitting with all the others."""

TCMALLOC = Path("/usr/lib/x86_64-linux-gnu/libtcmalloc_minimal.so.4")
ALLOCATORS = {
    "kept": {},
    "tcmalloc": {"LD_PRELOAD": str(TCMALLOC), "TCMALLOC_LARGE_ALLOC_REPORT_THRESHOLD": str(2**40)},
    "plain": {"EPIGONE_RUNTIME": "off"},
}
"""kept: what `epigone.runtime` sets, in each process alike; plain: what the C library does by itself."""


class Shape(NamedTuple):
    """The sizes of the models and of the work."""

    vocab_size: int
    batch_size: int
    length: int
    threads: int


def serve(name: str, work: Work) -> None:
    """What a process does: be this trainer until nothing more is asked."""
    prepare()
    answers = Answers()
    if name in (OURS, PRODUCTS[0]):
        from trainers import ours

        return ours.serve(work, answers) if name == OURS else ours.serve_products(work, answers)
    if name == TUNIX:
        from trainers import tunix_trainer

        return tunix_trainer.serve(work, answers)
    if name == TRL:
        from trainers import trl_trainer

        return trl_trainer.serve(work, answers)
    from trainers import torch_loop

    if name == PRODUCTS[1]:
        return torch_loop.serve_products(work, answers)
    model = torch_loop.HuggingFace if name == EAGER else torch_loop.Lean
    loss = torch_loop.chunked_loss() if name == LIGER else torch_loop.trl_loss(compiled=name != EAGER)
    return torch_loop.serve(work, answers, model, loss, compiled=name != EAGER)


class Trainer:
    """A process that does one step whenever it is asked.

    Attributes:
        losses: of its first two steps.
        compiling: seconds of the first step, less those of the second.
        peak: bytes that it has had at most.
    """

    def __init__(self, name: str, work: Work, setting: dict[str, str]) -> None:
        command = [sys.executable, __file__, "--serve", json.dumps([name, str(work.folder), *work[1:]])]
        self.name, self.peak = name, 0
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._errors}
        self._process = subprocess.Popen(command, env=os.environ | setting, text=True, **pipes)
        self._answer()
        self.losses, self.compiling = (float("nan"),) * 2, 0.0

    def begin(self) -> "Trainer":
        """The first two steps."""
        (first, begin), (second, then) = self.ask(), self.ask()
        self.losses, self.compiling = (begin, then), first - second
        return self

    def ask(self, step: str = "step") -> tuple[float, float]:
        """Seconds of a step, and its loss or speed."""
        assert self._process.stdin
        print(step, file=self._process.stdin, flush=True)
        answer = self._answer()
        self.peak = answer["peak"]
        return answer["seconds"], answer["value"]

    def seconds(self, step: str = "step") -> float:
        """Seconds of a step while no others are at work."""
        return undisturbed(lambda: self.ask(step)[0], self._process.pid)

    def end(self) -> None:
        """Nothing more is asked."""
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            self._errors.seek(0)
            raise SystemExit(f"{self.name} came to an end:\n{self._errors.read()[-3000:]}")
        return json.loads(line)


def write_models(shape: Shape, folder: Path) -> int:
    """Random weights of teacher and student as transformers writes them; floating-point operations of a step."""
    from epigone.interchange.streaming import save_weights
    from epigone.models.config import DecoderConfig
    from epigone.models.decoder import flops_per_token, init
    from epigone.models.language_model import Specials

    flops = 0
    for seed, (role, layers, size) in enumerate((("teacher", 8, 512), ("student", 4, 256))):
        sizes: dict[str, Any] = {"vocab_size": shape.vocab_size, "layers": layers, "model_size": size}
        config = DecoderConfig(
            **sizes,
            heads=size // 64,
            vocab_multiple=1,
            max_length=shape.length,
            specials=Specials(never=()),
            rope_theta=1e6,  # the one that Tunix has, whatever a config says
        )
        save_weights(folder / role, config, init(config, seed))
        flops += flops_per_token(config, shape.length, training=role == "student")
    return flops * shape.batch_size * shape.length


class Found(NamedTuple):
    """What was measured of one trainer: seconds of its steps and of Epigone's in the same rounds, bytes, seconds."""

    seconds: np.ndarray
    ours: np.ndarray
    peak: int
    compiling: float


def installed(names: list[str]) -> list[str]:
    """Those whose packages are there; a line for each other."""
    found = []
    for name in names:
        absent = [package for package in NEEDS[name] if find_spec(package) is None]
        if absent:
            print(f"left out: {name}, for {', '.join(absent)} is not installed")
        else:
            found.append(name)
    return found


def check(trainers: list[Trainer], wanted: tuple[float, float], forward_kl: float) -> None:
    """Raises SystemExit for a trainer that computes something else."""
    for one in trainers:
        # TRL's trainer learns something else, so only its first loss is known.
        losses, other = (one.losses[:1], (forward_kl,)) if one.name == TRL else (one.losses, wanted)
        if not np.allclose(losses, other, rtol=1e-4, atol=0):
            raise SystemExit(f"{one.name} begins with losses of {losses}, and Epigone with {other}")


def sitting(trainers: dict[str, Trainer], rounds: int) -> tuple[dict[str, np.ndarray], float]:
    """Seconds of each trainer in each round, those of Epigone with real data too; and the fastest product, FLOP/s."""
    fastest = [0.0]

    def product(one: Trainer) -> float:
        seconds, speed = one.ask()
        fastest.append(speed)
        return seconds

    jobs: dict[str, Callable[[], float]] = {}
    for name, one in trainers.items():
        jobs[name] = partial(product, one) if name in PRODUCTS else one.seconds
        if name == OURS:
            trainers[OURS].ask(REAL)
            jobs[REAL] = partial(one.seconds, REAL)
    return in_turn(jobs, rounds), max(fastest)


def compare(names: list[str], work: Work, setting: dict[str, str], rounds: int) -> tuple[dict[str, Found], float]:
    """All trainers, in as many sittings as there are large ones; and the fastest product, FLOP/s."""
    held = {name: Trainer(name, work, setting).begin() for name in names if name not in LARGE}
    wanted, forward_kl = held[OURS].losses, first_forward_kl(work, setting) if TRL in names else float("nan")
    check([one for name, one in held.items() if name not in PRODUCTS], wanted, forward_kl)
    found: dict[str, Found] = {}
    fastest = 0.0
    for large in [name for name in names if name in LARGE] or [None]:
        more = {} if large is None else {large: Trainer(large, work, setting).begin()}
        check(list(more.values()), wanted, forward_kl)
        seconds, speed = sitting(held | more, rounds)
        fastest = max(fastest, speed)
        for name, values in seconds.items():
            one = (held | more)[OURS if name == REAL else name]
            new = Found(values, seconds[OURS], one.peak, one.compiling)
            old = found.get(name)
            found[name] = new if old is None else merged(old, new)
        for one in more.values():
            one.end()
    for one in held.values():
        one.end()
    return found, fastest


def merged(old: Found, new: Found) -> Found:
    """Rounds of one sitting after those of another."""
    return Found(*(np.concatenate([old[i], new[i]]) for i in (0, 1)), new.peak, new.compiling)  # type: ignore[misc]


def report(found: dict[str, Found], fastest: float, flops: int, tokens: int) -> None:
    """The table."""
    peers = {name: one for name, one in found.items() if name not in (OURS, REAL, *PRODUCTS)}
    speeds = {name: float(np.median(one.ours / one.seconds)) for name, one in found.items()}
    best = max(peers, key=speeds.__getitem__, default=OURS)
    print(f"fastest product {fastest / 1e9:,.0f} GFLOP/s; fastest peer: {best}")
    heads = ("tokens/s", "of the fastest", "Epigone is faster by", "quartiles", "peak MB", "of peak", "compile, s")
    print(f"{'':30}" + "".join(f"{head:>{len(head) + 3}}" for head in heads))
    for name in (OURS, *peers):
        one, own = found[name], found[OURS]
        low, middle, high = quartiles(one.seconds, one.ours)
        typical = float(np.median(own.seconds)) / speeds[name]
        print(
            f"{name:30}{tokens / typical:11,.0f}{speeds[name] / speeds[best]:17.2f}{middle:23.2f}"
            f"{low:8.2f}-{high:.2f}{one.peak / 1e6:10,.0f}{flops / typical / fastest:10.2f}{one.compiling:13.1f}"
        )
    if REAL in found:
        low, middle, high = quartiles(found[REAL].seconds, found[REAL].ours)
        print(f"a step on data from the pipeline, beside one constant batch: {middle:.3f} ({low:.3f}-{high:.3f})")


def second_start(work: Work, setting: dict[str, str]) -> float:
    """Seconds of compilation of Epigone's step where an earlier process has kept it."""
    again = Trainer(OURS, work, setting).begin()
    again.end()
    return again.compiling


def first_forward_kl(work: Work, setting: dict[str, str]) -> float:
    """KL(teacher, student) of the first batch and the first weights at temperature 1, by Epigone."""
    one = Trainer(OURS, work, setting)
    found = one.ask("forward_kl")[1]
    one.end()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = {"vocab-size": 32_000, "batch-size": 16, "length": 256, "threads": os.cpu_count() or 1, "rounds": 5}
    for name, value in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=value, help=f"default {value}")
    parser.add_argument("--allocator", choices=ALLOCATORS, default="kept", help="of all processes; default kept")
    parser.add_argument("--only", nargs="*", default=list(NEEDS), choices=NEEDS, help="default: all that are installed")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    given = vars(parser.parse_args())
    if given["serve"]:
        name, folder, *sizes = json.loads(given["serve"])
        return serve(name, Work(Path(folder), *sizes))
    if given["allocator"] == "tcmalloc" and not TCMALLOC.exists():
        raise SystemExit(f"there is no {TCMALLOC}: apt install libtcmalloc-minimal4, or another --allocator")
    shape = Shape(**{name: given[name] for name in Shape._fields})
    os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[: shape.threads]))
    with tempfile.TemporaryDirectory() as folder:
        flops = write_models(shape, Path(folder))
        work = Work(Path(folder), shape.batch_size, shape.length, shape.threads)
        caches = {"JAX_COMPILATION_CACHE_DIR": f"{folder}/jax", "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor"}
        quiet = {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        setting = caches | quiet | {"OMP_NUM_THREADS": str(shape.threads)} | ALLOCATORS[given["allocator"]]
        print(f"{shape}, allocator {given['allocator']}, {given['rounds']} rounds")
        found, fastest = compare(installed(given["only"]), work, setting, given["rounds"])
        report(found, fastest, flops, shape.batch_size * shape.length)
        print(f"compilation of Epigone's step at its second start: {second_start(work, setting):.1f} s")
    return None


if __name__ == "__main__":
    main()
