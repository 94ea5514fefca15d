"""How a node learns its lesson: its weights come from files, it counts, or it is trained, alone or beside others."""

import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

from epigone import watchdog
from epigone.data.pipeline import Batches, Rows, pack
from epigone.identity import fingerprint
from epigone.lineage import Lesson, Node
from epigone.materials import Materials, count_tokens, fill, seed_of
from epigone.models.language_model import Document
from epigone.models.ngram import NGram, NGramModel
from epigone.pretrained import import_weights
from epigone.processes import first_then_all, is_first
from epigone.starting import starting_weights
from epigone.storage.folders import writing
from epigone.teaching import teacher_of
from epigone.training.config import Hardware
from epigone.view import View


def learn(node: Node, materials: Materials, hardware: Hardware, view: View) -> dict[str, Any]:
    """Learn the lesson and leave the model in the node's directory; what the record tells of it."""
    if node.lesson.source:
        view.stage("import")
        return import_weights(node, materials, hardware)
    return (_count if isinstance(node.model, NGram) else _train)(node, materials, hardware, view)


def _read(node: Node, materials: Materials, view: View) -> list[list[Document]]:
    """The documents of each source of a lesson; what another node writes is written first."""
    view.stage("read text")
    with first_then_all(f"{node.key} reads"):
        return [materials.documents(source, node.tokenizer) for source in node.lesson.text]


def packed(node: Node, materials: Materials, view: View) -> list[Rows]:
    """The texts of a lesson in rows, a source each."""
    specials = materials.tokenizer(node.tokenizer).specials
    return [pack(source, node.lesson.training.sequence_length, specials) for source in _read(node, materials, view)]


def _count(node: Node, materials: Materials, _hardware: Hardware, view: View) -> dict[str, Any]:
    """Fit a model that counts; every process does, and the first one saves it."""
    sources = _read(node, materials, view)
    view.stage("count")
    documents = [document for source in sources for document in source]
    validation = node.lesson.validation
    held_out = materials.documents(validation, node.tokenizer) if validation else None
    model = NGramModel.fit(node.model, documents, materials.tokenizer(node.tokenizer).size, held_out)
    directory = materials.store.weights(node)
    if is_first():
        with writing(directory) as local:
            local.mkdir(parents=True, exist_ok=True)
            model.save(local / "ngram.safetensors")
    materials.keep(node, model)
    return {"parameters": model.parameter_count, "tokens": count_tokens(documents), "scale": model.scale}


def _train(node: Node, materials: Materials, hardware: Hardware, view: View) -> dict[str, Any]:
    """Train a model that multiplies matrices. JAX starts here."""
    import jax

    from epigone.training import checkpoint, loop
    from epigone.training.compilation import compilation
    from epigone.training.on_policy import TEXT_ONLY

    lesson, identity = node.lesson, materials.store.lineage.identities[node.key]
    config = fill(node.model, materials.tokenizer(node.tokenizer))
    rows = packed(node, materials, view)
    seed, read, start = _beginning(node, materials, rows)
    directory = materials.store.directory(node)
    teacher, asked = teacher_of(node, materials, rows, hardware, view)
    view.stage("train", lesson.training.steps)
    began = time.monotonic()
    watchdog.at(node.key, 0)

    def stepped(report: loop.StepReport) -> None:
        watchdog.at(node.key, report.step)
        view.step(report)

    with compilation() as compiled:
        trained = loop.train(
            config,
            lesson.training,
            lesson.objective,
            read(jax.process_index(), jax.process_count()),
            seed=seed,
            identity=identity,
            teacher=teacher,
            on_policy=lesson.on_policy or TEXT_ONLY,
            initial_params=start,
            adapters=lesson.adapters,
            hardware=hardware,
            directory=directory / "training",
            on_step=stepped,
            key=node.key,
        )
    watchdog.at(node.key, None)
    if trained.adapters is not None:
        checkpoint.save_params(directory / "adapters", trained.adapters)
    checkpoint.save_params(materials.store.weights(node), trained.params)
    told = _told(config, lesson, trained, asked, compiled)
    return told | {"seconds_before": max(0.0, trained.seconds - (time.monotonic() - began))}


def _beginning(
    node: Node, materials: Materials, rows: list[Rows]
) -> tuple[int, Callable[..., Batches], Callable[[], Any] | None]:
    """Seed and data of a training, and what gives its first weights where these are not random."""
    lesson = node.lesson
    # What the lesson's teacher and objective are is left out: a student and its control start alike and read alike.
    parts = [node.model, node.tokenizer, lesson.text, lesson.weights, lesson.training, node.seed]
    recipe = fingerprint([*parts, lesson.initialisation] if lesson.initialisation else parts)
    seed = seed_of(recipe, "train")
    read = partial(Batches, rows, lesson.weights, lesson.training.batch_size, seed_of(recipe, "data"))
    return seed, read, partial(starting_weights, node, materials, read(), seed) if lesson.start_from else None


def learn_together(nodes: list[Node], materials: Materials, hardware: Hardware, view: View) -> dict[str, Any]:
    """Train nodes of one shape in one program, and save those that are not done; what was learned, by key.

    All are trained again where one is left, so that a run that was killed comes to the same end.
    """
    store = materials.store
    if all(store.record(node) is not None for node in nodes):
        return {}
    from epigone.training import checkpoint
    from epigone.training.compilation import compilation
    from epigone.training.together import Member, train_together

    first = nodes[0]
    view.start(first)
    lesson, config = first.lesson, fill(first.model, materials.tokenizer(first.tokenizer))
    teacher, asked = teacher_of(first, materials, [], hardware, view)
    members = []
    for node in nodes:
        seed, read, start = _beginning(node, materials, packed(node, materials, view))
        members.append(Member(node.key, seed, read(), start))
    view.stage(f"train, with {len(nodes) - 1} more", lesson.training.steps)
    with compilation() as compiled:
        trained = train_together(config, lesson.training, lesson.objective, members, teacher=teacher, on_step=view.step)
    for node, one in zip(nodes, trained, strict=True):
        if store.record(node) is None:
            checkpoint.save_params(store.weights(node), one.params)
    found = zip(nodes, trained, strict=True)
    more = {"together": len(nodes)}
    return {
        node.key: _told(config, lesson, one, dict(asked), compiled) | more | {"seconds_before": one.seconds}
        for node, one in found
    }


def _told(config: Any, lesson: Lesson, trained: Any, asked: dict[str, Any], compiled: Any) -> dict[str, Any]:
    """What a record tells of a training: its `Trained`, what its teacher was asked, what was compiled."""
    from epigone.models.decoder import attention_of, parameter_count

    return {
        "parameters": parameter_count(config),
        "trained_parameters": trained.trained,
        "optimizer_bytes": trained.optimizer_bytes,
        "tokens": trained.tokens,
        "flops": trained.flops + asked.pop("flops", 0),
        **asked,
        "attention": str(attention_of(config, lesson.training.sequence_length)),
        "compilation": asdict(compiled),
        "curve": trained.curve,
    }
