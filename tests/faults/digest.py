"""What came of a run, as JSON: digests of all weights and texts, and of each record what no clock and host says.

python digest.py RUN [RUN ...]
"""

import hashlib
import json
import sys
from pathlib import Path

import jax
import numpy as np

from epigone.opened import open_node

TIMES = {"seconds", "tokens_per_second", "flops_per_second", "mfu"}
KEPT = ("identity", "parameters", "tokens", "flops", "metrics", "data")


def of_run(run: Path) -> dict[str, dict[str, str]]:
    """Of each node."""
    nodes = json.loads((run / "lineage.json").read_text())["nodes"]
    return {node["key"]: of_node(run, node["key"]) for node in nodes}


def of_node(run: Path, key: str) -> dict[str, str]:
    """Name -> digest."""
    node = open_node(key, run)
    leaves = jax.tree_util.tree_flatten_with_path(node.model.params)[0]
    arrays = {f"weights{jax.tree_util.keystr(path)}": np.asarray(leaf).tobytes() for path, leaf in leaves}
    curve = [{name: value for name, value in point.items() if name not in TIMES} for point in node.record["curve"]]
    said = {name: node.record.get(name) for name in KEPT} | {"curve": curve}
    texts = {name: json.dumps(value, sort_keys=True).encode() for name, value in said.items()}
    return {name: hashlib.sha256(value).hexdigest()[:16] for name, value in (arrays | texts).items()}


if __name__ == "__main__":
    print(json.dumps([of_run(Path(run)) for run in sys.argv[1:]]))
