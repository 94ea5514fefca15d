"""`epigone label CONFIG`: ask the teachers of lessons that keep scores, once; on many hosts at once."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console

from epigone.errors import UserError
from epigone.lineage import Lineage, Node
from epigone.store import Store
from epigone.verbs.run import read_config
from epigone.view import Terminal


def label_texts(arguments: Sequence[str]) -> None:
    """Score the texts of all nodes, or of `--node`, whose lesson keeps scores and whose parents are done.

    The same command on several hosts that see one file system, or one bucket, shares the work. `epigone run` does what
    is left.
    """
    given = read_config(arguments, "label")
    if given is None:
        return
    lineage, directory, options = given
    store = Store(directory, lineage, options.data)
    nodes = [lineage[options.node]] if options.node else list(lineage.nodes)
    keeping = [node for node in nodes if node.lesson.scores]
    if not keeping:
        raise UserError(f"no lesson of {options.node or lineage.name} keeps scores: set its field 'scores'")
    ready = [node for node in keeping if _is_ready(store, node)]
    if options.dry_run:
        print("\n".join(f"{node.key}: {'ready' if node in ready else 'its parents are not done'}" for node in keeping))
        return
    if not ready:
        node = keeping[0]
        raise UserError(f"node '{node.key}' learns from '{node.lesson.teacher}', which is not done: grow it first")
    _label(lineage, store, ready, options)


def _label(lineage: Lineage, store: Store, nodes: list[Node], options: Any) -> None:
    from epigone.learning import packed
    from epigone.materials import Materials
    from epigone.processes import is_first
    from epigone.teaching import ask

    materials, work = Materials(store), {node.key: 1.0 for node in nodes}
    with store.share(), Terminal(lineage.name, work, Console(quiet=not is_first())) as view:
        for node in nodes:
            view.start(node)
            told = ask(node, materials, packed(node, materials, view), options.hardware, view)[1]["scores"]
            view.finish(node, {"seconds": told["seconds"]})
            if is_first():
                each = told["bytes"] / max(1, told["tokens"])
                print(f"{node.key}: {told['tokens']:,} tokens, {told['asked']:,} scored now; {each:.1f} bytes a token")


def _is_ready(store: Store, node: Node) -> bool:
    """Whether its teacher is done, and whoever wrote and judged its texts."""
    return all(store.record(store.lineage[key]) for key, role in node.parents if role != "start")
