"""Checkpoints: sealed with a checksum of every file, visible only when whole. The only place that knows Orbax.

    DIRECTORY/arrays/...       what Orbax writes, one entry an array
    DIRECTORY/manifest.json    what it is (identity, step, ...), the shape of each array, size and SHA-256 of each file

A checkpoint is written under a hidden name and renamed when its manifest is there. Orbax is imported at the first use:
that takes a second, and short runs need it only at their end.
"""

import contextlib
import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from epigone.errors import Fault, UserError

KEEP = 2
"""Checkpoints of a running node that are kept: the last, and the one before should the last be damaged."""


class Damaged(Exception):
    """A checkpoint that is not what its manifest says."""


def save_params(directory: Path, params: Any) -> None:
    """Write the parameters of a finished node, whole or not at all; what was there before is replaced.

    Raises: Fault if they cannot be written (a full disk).
    """
    arrays = _flat(params)
    hidden = _hidden(directory)
    with _writing(directory):
        _start_saving(hidden, arrays, kept=True)()
        _seal(hidden, directory, {"arrays": _signature(arrays)})


def load_params(directory: Path, abstract: Any) -> Any:
    """Read parameters onto the devices and shardings of `abstract`, a tree of arrays or ShapeDtypeStructs.

    Raises: Fault if they are missing or damaged; UserError if they are those of another model.
    """
    if not directory.is_dir():
        raise Fault(f"no parameters in {directory}: grow the node that they belong to again")
    try:
        manifest = _verify(directory)
        _check_signature(directory, manifest, abstract)
        return _restore(directory, abstract)
    except Damaged as damage:
        raise Fault(
            f"parameters {directory} are damaged ({damage}): delete that directory and grow the node again"
        ) from None


class Checkpointer:
    """The checkpoints of one running node: written in the background, the last two kept.

    Args:
        directory: where they lie, one directory `step_N` each.
        identity: the node's; a checkpoint of another one is refused.
    """

    def __init__(self, directory: Path, identity: str) -> None:
        self._directory, self._identity = directory, identity
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def restore(self, abstract: Any) -> tuple[Any, dict[str, Any]] | None:
        """The newest checkpoint that is whole: its arrays, and what was said about it; None where there is none.

        A damaged one is set aside with a warning. Raises UserError for one of another node or another model.
        """
        found = _chosen_by_first_process(self._newest_whole)
        if found < 0:
            return None
        directory = self._path(found)
        manifest = json.loads((directory / "manifest.json").read_text())
        if manifest["identity"] != self._identity:
            raise UserError(
                f"checkpoint {directory} belongs to node identity {manifest['identity']}, this node is "
                f"{self._identity}: delete {self._directory}, or use another run directory"
            )
        _check_signature(directory, manifest, abstract)
        return _restore(directory, abstract), manifest["about"]

    def save(self, step: int, state: Any, about: dict[str, Any]) -> None:
        """Start to write a checkpoint. `state` may be donated or changed as soon as this returns.

        Raises: Fault if the one before could not be written.
        """
        self.wait()
        arrays, final = _flat(state), self._path(step)
        hidden = _hidden(final)
        manifest = {"identity": self._identity, "step": step, "arrays": _signature(arrays), "about": about}
        with _writing(final):
            finish = _start_saving(hidden, arrays)
        self._pending = self._executor.submit(self._finish, finish, hidden, final, manifest)

    def wait(self) -> None:
        """Wait until all is on disk. Raises: Fault if it could not be written."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def close(self) -> None:
        """Wait, and let go of the thread."""
        try:
            self.wait()
        finally:
            self._executor.shutdown()

    def _finish(self, finish: Callable[[], None], hidden: Path, final: Path, manifest: dict[str, Any]) -> None:
        with _writing(final):
            finish()
            if jax.process_index() == 0:
                _publish(hidden, final, manifest)
                for step in self._steps()[:-KEEP]:
                    shutil.rmtree(self._path(step))

    def _newest_whole(self) -> int:
        for leftover in self._directory.glob(".*.tmp"):
            shutil.rmtree(leftover)
        steps = self._steps()
        while steps:
            path = self._path(steps.pop())
            try:
                _verify(path)
                return int(path.name.removeprefix("step_"))
            except Damaged as damage:
                instead = f"using {self._path(steps[-1])}" if steps else "there is none before it, starting at step 0"
                warnings.warn(f"checkpoint {path} is damaged ({damage}): {instead}", stacklevel=4)
                aside = path.with_suffix(".damaged")
                shutil.rmtree(aside, ignore_errors=True)
                path.rename(aside)
        return -1

    def _steps(self) -> list[int]:
        names = (path.name.removeprefix("step_") for path in self._directory.glob("step_*"))
        return sorted(int(name) for name in names if name.isdigit())

    def _path(self, step: int) -> Path:
        return self._directory / f"step_{step:08}"


def _flat(tree: Any) -> dict[str, Any]:
    """Arrays by path: the layout on disk does not depend on the Python types that hold them."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _signature(arrays: dict[str, Any]) -> dict[str, list[Any]]:
    return {name: [list(array.shape), str(array.dtype)] for name, array in arrays.items()}


def _check_signature(directory: Path, manifest: dict[str, Any], abstract: Any) -> None:
    there, wanted = manifest["arrays"], _signature(_flat(abstract))
    for name in sorted(there.keys() | wanted.keys()):
        if there.get(name) != wanted.get(name):
            a, b = (f"{x[name][1]}{x[name][0]}" if name in x else "absent" for x in (there, wanted))
            raise UserError(f"checkpoint {directory} is of another model: '{name}' is {a} there and {b} here")


def _start_saving(hidden: Path, arrays: dict[str, Any], kept: bool = False) -> Callable[[], None]:
    """Copy the arrays off the devices, start to write them, and return a function that waits for the end.

    Arrays that are `kept` as they are until then need no copy.
    """
    import orbax.checkpoint as ocp

    if jax.process_index() == 0:
        shutil.rmtree(hidden, ignore_errors=True)
        hidden.mkdir(parents=True)
    _barrier("checkpoint directory")
    if jax.process_count() == 1 and jax.default_backend() == "cpu" and not kept:
        # On a CPU a NumPy view of an array is the array itself, which the next step overwrites: make real copies.
        arrays = {name: np.array(array) for name, array in arrays.items()}
    checkpointer = ocp.StandardCheckpointer()
    checkpointer.save((hidden / "arrays").absolute(), arrays)

    def finish() -> None:
        checkpointer.wait_until_finished()
        checkpointer.close()

    return finish


def _restore(directory: Path, abstract: Any) -> Any:
    """Arrays where `abstract` places them; what it places nowhere, on this process's first device."""
    import orbax.checkpoint as ocp

    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def target(leaf: Any) -> Any:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None) or here)

    names, targets = zip(*((name, target(leaf)) for name, leaf in _flat(abstract).items()), strict=True)
    process = jax.process_index()
    alone = all(target.sharding == here for target in targets)
    # A process that reads for itself must not wait for others, which may not read at all.
    options = ocp.options.MultiprocessingOptions(
        primary_host=process if alone else 0,
        active_processes={process} if alone else None,
        barrier_sync_key_prefix=f"process {process}" if alone else None,
    )
    with ocp.StandardCheckpointer(multiprocessing_options=options) as checkpointer:
        arrays = checkpointer.restore((directory / "arrays").absolute(), dict(zip(names, targets, strict=True)))
    return jax.tree.unflatten(jax.tree.structure(abstract), [arrays[name] for name in names])


def _seal(hidden: Path, final: Path, manifest: dict[str, Any]) -> None:
    if jax.process_index() == 0:
        _publish(hidden, final, manifest)
    _barrier("checkpoint sealed")


def _publish(hidden: Path, final: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest, and give the directory its name in one step."""
    files = {str(p.relative_to(hidden)): _checksum(p) for p in sorted(hidden.rglob("*")) if p.is_file()}
    with (hidden / "manifest.json").open("w") as file:
        json.dump(manifest | {"files": files}, file)
        file.flush()
        os.fsync(file.fileno())
    if final.exists():
        old = final.with_name(f".{final.name}.old.tmp")
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
        hidden.rename(final)
        shutil.rmtree(old)
    else:
        hidden.rename(final)


def _verify(directory: Path) -> dict[str, Any]:
    """The manifest, if every file is as it says."""
    try:
        manifest = json.loads((directory / "manifest.json").read_text())
        files = manifest["files"]
    except (OSError, ValueError, KeyError):
        raise Damaged("its manifest.json is missing or unreadable") from None
    for name, sealed in files.items():
        path = directory / name
        if not path.is_file():
            raise Damaged(f"{name} is missing")
        if _checksum(path) != sealed:
            raise Damaged(f"{name} has another size or checksum than it was written with")
    return manifest


def _checksum(path: Path) -> list[Any]:
    with path.open("rb") as file:
        return [path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()]


def _hidden(final: Path) -> Path:
    return final.with_name(f".{final.name}.tmp")


@contextlib.contextmanager
def _writing(final: Path) -> Iterator[None]:
    """Any failure to write becomes one line."""
    try:
        yield
    except (OSError, ValueError) as error:  # Tensorstore reports a full disk as a ValueError.
        full = "No space left on device"
        reason = full if full in str(error) else str(error).splitlines()[0][:300]
        raise Fault(f"could not write {final}: {reason}; make room there, and run the same command again") from error


def _chosen_by_first_process(choose: Callable[[], int]) -> int:
    """All processes must go on from the same checkpoint: the first one looks, the others are told."""
    if jax.process_count() == 1:
        return choose()
    chosen = choose() if jax.process_index() == 0 else -1
    return int(multihost_utils.broadcast_one_to_all(np.int32(chosen)))


def _barrier(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
