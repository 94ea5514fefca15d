"""A training run in a process of its own, which can be killed, or be one of several.

python child.py DIRECTORY [--kill STEP] [--terminate STEP] [--process INDEX COUNT PORT] [--every STEPS] [--pace SECONDS]
    [--axis NAME] [--own]
"""

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import conftest  # noqa: F401
from compiler_flags import QUICK

parser = argparse.ArgumentParser()
parser.add_argument("directory", help="on a disk or in a bucket")
parser.add_argument("--kill", type=int)
parser.add_argument("--terminate", type=int)
parser.add_argument("--every", type=int, default=1)
parser.add_argument("--pace", type=float, default=0.0)
parser.add_argument("--process", type=int, nargs=3, metavar=("INDEX", "COUNT", "PORT"), default=(0, 1, 0))
parser.add_argument("--axis", default="data", help="over which processes lie on the mesh")
parser.add_argument("--own", action="store_true", help="learn from own texts")
given = parser.parse_args()
index, count, port = given.process

if count > 1:
    os.environ["XLA_FLAGS"] = QUICK

import jax  # noqa: E402

if count > 1:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", count, index)

from training_toy import Counting, measures, own_texts, run  # noqa: E402

from epigone.storage.places import place  # noqa: E402
from epigone.training.config import Hardware  # noqa: E402
from epigone.training.loop import Stopped  # noqa: E402


def at_step(report):
    time.sleep(given.pace)
    if report.step == given.kill:
        os.kill(os.getpid(), signal.SIGKILL)
    if report.step == given.terminate:
        os.kill(os.getpid(), signal.SIGTERM)


try:
    trained = run(
        place(given.directory),
        batches=Counting(process_index=index, process_count=count),
        hardware=Hardware(**{given.axis: count}, checkpoint_every_seconds=None, checkpoint_every_steps=given.every),
        on_step=at_step,
        **(own_texts() if given.own else {}),
    )
    print(json.dumps(measures(trained)))
except Stopped as stopped:
    print(json.dumps(str(stopped)))
