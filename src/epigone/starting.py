"""What a trained node begins with, where it starts from another: all of its weights, or those that it inherits."""

from dataclasses import replace
from typing import Any

from epigone.data.pipeline import Batches
from epigone.errors import UserError
from epigone.lineage import Node
from epigone.materials import Materials, fill
from epigone.models.language_model import Specials
from epigone.models.ngram import NGram

CALIBRATION_BATCHES = 4
"""Batches of the lesson's own text on which the parent's units are weighed."""


def check_start(node: Node, materials: Materials) -> None:
    """Refuse, before any work, a start that does not fit. Raises UserError that names both nodes."""
    lesson, start = node.lesson, materials.store.lineage[node.lesson.start_from or ""]
    where = f"node '{node.key}' starts from '{start.key}'"
    if isinstance(start.model, NGram):
        raise UserError(f"{where}, which counts words and has no weights to start from")
    theirs, ours = (materials.tokenizer(config) for config in (start.tokenizer, node.tokenizer))
    if theirs.vocabulary != ours.vocabulary:
        raise UserError(f"{where}, which reads another tokenizer: give both one tokenizer")
    if lesson.adapters is not None:
        _check_adapters(where, node, materials)
    if lesson.inherit is None:
        if _shape(start.model) != _shape(node.model):
            raise UserError(f"{where}, which has another shape: give both one model, or say in 'inherit' what is taken")
        return
    from epigone.models.inherit import check

    try:
        check(_sized(start, materials), _sized(node, materials), lesson.inherit, ours.tokens)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _check_adapters(where: str, node: Node, materials: Materials) -> None:
    from epigone.models.adapters import adapter_weights

    if node.model.quantization is not None:
        raise UserError(
            f"{where} with adapters and quantization, and what is merged would be rounded anew: quantise in a node of "
            "its own that starts from this one"
        )
    if node.lesson.inherit is not None and node.lesson.inherit.needs_calibration:
        raise UserError(
            f"{where} with adapters and units that are chosen on text, which a resumed run would choose again: inherit "
            "in a node of its own, and start from that"
        )
    try:
        adapter_weights(node.lesson.adapters, _sized(node, materials))
    except UserError as error:
        raise UserError(f"node '{node.key}': {error}") from None


def check_quantization(node: Node, materials: Materials) -> None:
    """Refuse blocks that do not fit, and quantization without its library. Raises UserError that names the node."""
    from epigone.models.projections import input_sizes
    from epigone.models.quantization import check

    try:
        check(node.model.quantization, input_sizes(_sized(node, materials)))
    except UserError as error:
        raise UserError(f"node '{node.key}': {error}") from None


def starting_weights(node: Node, materials: Materials, batches: Batches, seed: int) -> Any:
    """The weights to start from, on the mesh that is set.

    Args:
        node: the node, checked by `check_start`.
        materials: knows the parent.
        batches: global batches of the lesson; the first of them weigh the parent's units.
        seed: of the weights that are not inherited.
    """
    import jax

    from epigone.models import decoder
    from epigone.models.sharding import spread

    parent: Any = materials.model(materials.store.lineage[node.lesson.start_from or ""])
    from epigone.models.inherit import Inherit, inherit

    config, how = _sized(node, materials), node.lesson.inherit
    if how is None and config.sizes.V == parent.config.sizes.V:
        return jax.tree.map(lambda array: array.astype(config.weights_dtype), parent.params)
    how = how or Inherit()
    drawn = (batches.batch(step) for step in range(CALIBRATION_BATCHES)) if how.needs_calibration else ()
    calibration = [(batch.tokens_BT, batch.positions_BT, batch.segments_BT) for batch in drawn]
    theirs = spread(parent.params, jax.tree.map(lambda leaf: leaf.sharding, decoder.abstract(parent.config)))
    tokens = materials.tokenizer(node.tokenizer).tokens
    return inherit(parent.config, theirs, config, decoder.init(config, seed), how, calibration, tokens=tokens)


def _shape(model: Any) -> Any:
    """A decoder's config without what says nothing about its weights' shapes and places."""
    types = {"dtype": "float32", "weights_dtype": "float32", "remat": None, "quantization": None}
    return replace(model, vocab_size=None, vocab_multiple=1, specials=Specials(), **types)


def _sized(node: Node, materials: Materials) -> Any:
    return fill(node.model, materials.tokenizer(node.tokenizer))
