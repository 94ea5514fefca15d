"""Checkpoints: sealed with a checksum of every file, visible only when whole. The only place that knows Orbax.

    DIRECTORY/manifest.json    what it is (identity, step, ...), the shape of each array, size and checksum of each file
    DIRECTORY/arrays/...       on a disk, what Orbax writes (`sealed_on_disk`)
    DIRECTORY/PART/arrays/...  in a bucket, what `stored_arrays` writes (`sealed_in_bucket`): Orbax knows no s3://

Orbax is imported at the first use: that takes a second, and short runs need it only at their end.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from epigone.errors import Fault, UserError
from epigone.storage.places import on_store
from epigone.storage.reasons import explained
from epigone.training import sealed_in_bucket, sealed_on_disk
from epigone.training.sealed import Damaged, read_manifest

KEEP = 2
"""Checkpoints of a running node that are kept: the last, and the one before should the last be damaged."""


def save_params(directory: Path, params: Any) -> None:
    """Write the parameters of a finished node, whole or not at all; what was there before is replaced.

    Raises: Fault if they cannot be written (a full disk).
    """
    arrays, number = _flat(params), _begun(directory)
    with _writing(directory):
        _start_saving(directory, number, arrays, kept=True)()
        if jax.process_index() == 0:
            _seals(directory).seal(directory, number, {"arrays": _signature(arrays)})
        _barrier("checkpoint sealed")


def load_params(directory: Path, abstract: Any) -> Any:
    """Read parameters onto the devices and shardings of `abstract`, a tree of arrays or ShapeDtypeStructs.

    Raises: Fault if they are missing or damaged; UserError if they are those of another model.
    """
    seals = _seals(directory)
    if not seals.exists(directory):
        raise Fault(f"no parameters in {directory}: grow the node that they belong to again")
    try:
        manifest = seals.verify(directory)
        _check_signature(directory, manifest, abstract)
        return _restore(seals.sealed(directory, manifest), abstract)
    except Damaged as damage:
        raise Fault(
            f"parameters {directory} are damaged ({damage}): delete that directory and grow the node again"
        ) from None


LONGEST_WAIT = 3600
"""Seconds that a process waits for others to write their parts."""


class Checkpointer:
    """The checkpoints of one running node: written in the background, the last two kept.

    Args:
        directory: where they lie, one directory `step_N` each.
        identity: the node's; a checkpoint of another one is refused.
    """

    def __init__(self, directory: Path, identity: str) -> None:
        self._directory, self._identity, self._seals = directory, identity, _seals(directory)
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def restore(self, abstract: Any) -> tuple[Any, dict[str, Any]] | None:
        """The newest checkpoint that is whole: its arrays, and what was said about it; None where there is none.

        A damaged one is set aside with a warning. Raises UserError for one of another node or another model.
        """
        while (found := _chosen_by_first_process(self._newest_whole)) >= 0:
            directory = self._path(found)
            manifest = read_manifest(directory)
            if manifest["identity"] != self._identity:
                raise UserError(
                    f"checkpoint {directory} belongs to node identity {manifest['identity']}, this node is "
                    f"{self._identity}: delete {self._directory}, or use another run directory"
                )
            _check_signature(directory, manifest, abstract)
            arrays, damage = _attempt(self._seals.sealed(directory, manifest), abstract)
            if not _anywhere(damage is not None):
                return arrays, manifest["about"]
            if jax.process_index() == 0:
                self._set_aside(directory, damage or Damaged("another process could not read it"))
            _barrier("checkpoint set aside")
        return None

    def save(self, step: int, state: Any, about: dict[str, Any]) -> None:
        """Start to write a checkpoint. `state` may be donated or changed as soon as this returns.

        Raises: Fault if the one before could not be written.
        """
        self.wait()
        arrays, final = _flat(state), self._path(step)
        number = _begun(final)
        manifest = {"identity": self._identity, "step": step, "arrays": _signature(arrays), "about": about}
        with _writing(final):
            finish = _start_saving(final, number, arrays)
        self._pending = self._executor.submit(self._finish, finish, final, number, manifest)

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

    def _finish(self, finish: Callable[[], None], final: Path, number: int, manifest: dict[str, Any]) -> None:
        with _writing(final):
            finish()
            if jax.process_index() == 0:
                self._seals.seal(final, number, manifest)
                for step in self._steps()[:-KEEP]:
                    self._seals.remove(self._path(step))

    def _newest_whole(self) -> int:
        self._seals.clean(self._directory)
        for step in reversed(self._steps()):
            try:
                self._seals.verify(self._path(step))
                return step
            except Damaged as damage:
                self._set_aside(self._path(step), damage)
        return -1

    def _set_aside(self, path: Path, damage: Damaged) -> None:
        before = [step for step in self._steps() if self._path(step).name < path.name]
        instead = f"using {self._path(before[-1])}" if before else "there is none before it, starting at step 0"
        warnings.warn(f"checkpoint {path} is damaged ({damage}): {instead}", stacklevel=5)
        self._seals.set_aside(path)

    def _steps(self) -> list[int]:
        names = (name.removeprefix("step_") for name in self._seals.names(self._directory))
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


def _seals(directory: Path) -> Any:
    """What seals where a checkpoint lies."""
    return sealed_in_bucket if on_store(directory) else sealed_on_disk


def _begun(final: Path) -> int:
    """The first process makes room for a new checkpoint; all learn the number of its part."""
    with _writing(final):
        return _chosen_by_first_process(lambda: _seals(final).begin(final))


def _start_saving(final: Path, number: int, arrays: dict[str, Any], kept: bool = False) -> Callable[[], None]:
    """Copy the arrays off the devices, start to write them, and return a function that waits for the end.

    Arrays that are `kept` as they are until then need no copy.
    """
    import orbax.checkpoint as ocp

    place = _seals(final).written(final, number) / "arrays"
    if on_store(final):
        from epigone.training.stored_arrays import start_writing

        write = start_writing(place, arrays, kept)
        everyone = set(range(jax.process_count()))

        def finish() -> None:
            write()
            # Not over the devices, which train meanwhile.
            ocp.multihost.sync_global_processes(f"written {place}", processes=everyone, timeout=LONGEST_WAIT)

        return finish
    if jax.process_count() == 1 and jax.default_backend() == "cpu" and not kept:
        # On a CPU a NumPy view of an array is the array itself, which the next step overwrites: make real copies.
        arrays = {name: np.array(array) for name, array in arrays.items()}
    checkpointer = ocp.StandardCheckpointer()
    checkpointer.save(place.absolute(), arrays)

    def finish_on_disk() -> None:
        checkpointer.wait_until_finished()
        checkpointer.close()

    return finish_on_disk


def _attempt(place: Path, abstract: Any) -> tuple[Any, Damaged | None]:
    """The arrays, or what is wrong with them: all processes must hear of it."""
    try:
        return _restore(place, abstract), None
    except Damaged as damage:
        return None, damage


def _restore(place: Path, abstract: Any) -> Any:
    """Arrays where `abstract` places them; what it places nowhere, on this process's first device. Raises: Damaged."""
    named = _flat(abstract)
    if on_store(place):
        from epigone.training.stored_arrays import read

        arrays = read(place / "arrays", named)
    else:
        arrays = _restore_from_disk(place, named)
    return jax.tree.unflatten(jax.tree.structure(abstract), [arrays[name] for name in named])


def _restore_from_disk(directory: Path, abstract: dict[str, Any]) -> dict[str, Any]:
    import orbax.checkpoint as ocp

    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def target(leaf: Any) -> Any:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None) or here)

    names, targets = zip(*((name, target(leaf)) for name, leaf in abstract.items()), strict=True)
    process = jax.process_index()
    alone = all(target.sharding == here for target in targets)
    # A process that reads for itself must not wait for others, which may not read at all.
    options = ocp.options.MultiprocessingOptions(
        primary_host=process if alone else 0,
        active_processes={process} if alone else None,
        barrier_sync_key_prefix=f"process {process}" if alone else None,
    )
    with ocp.StandardCheckpointer(multiprocessing_options=options) as checkpointer:
        return dict(checkpointer.restore((directory / "arrays").absolute(), dict(zip(names, targets, strict=True))))


@contextlib.contextmanager
def _writing(final: Path) -> Iterator[None]:
    """Any failure to write becomes one line."""
    try:
        yield
    except (UserError, Fault):
        raise
    except Exception as error:
        # Tensorstore reports a full disk as a ValueError; the clients of stores have errors of their own.
        if on_store(final):
            raise Fault(_stored_reason(final, error)) from error
        if not isinstance(error, OSError | ValueError):
            raise
        full = "No space left on device"
        reason = full if full in str(error) else str(error).splitlines()[0][:300]
        raise Fault(f"could not write {final}: {reason}; make room there, and run the same command again") from error


def _stored_reason(final: Path, error: Exception) -> str:
    reason = explained(error, final) or str(error).splitlines()[0][:300]
    return f"could not write {final}: {reason}; when that is mended, run the same command again"


def _anywhere(here: bool) -> bool:
    """Whether it is so in any process."""
    if jax.process_count() == 1:
        return here
    return bool(np.any(multihost_utils.process_allgather(np.bool_(here))))


def _chosen_by_first_process(choose: Callable[[], int]) -> int:
    """All processes must go on from the same checkpoint: the first one looks, the others are told."""
    if jax.process_count() == 1:
        return choose()
    chosen = choose() if jax.process_index() == 0 else -1
    return int(multihost_utils.broadcast_one_to_all(np.int32(chosen)))


def _barrier(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
