"""What a node is and where it comes from, in words: its lesson, its lineage as a tree, and its numbers."""

import json
import re
from collections.abc import Mapping
from functools import partial
from pathlib import PurePath
from typing import Any, NamedTuple

from epigone.identity import canonical
from epigone.lessons.inner import Match
from epigone.lessons.objective import Objective
from epigone.lessons.schedules import Linear
from epigone.lineage import Lesson, Text, Written

DEPTH = 6
"""Levels of the lineage that the card draws; what lies further back is counted."""

Record = Mapping[str, Any]


class Line(NamedTuple):
    """One line of a card's table."""

    what: str
    value: str


def lesson_in_words(lesson: Lesson, seed: int) -> list[Line]:
    """Text, objective, temperature, start and length of a lesson, each in a few words."""
    if lesson.source:
        return [Line("Start", f"weights of {file_name(lesson.source.path)} (digest {lesson.source.digest}), unchanged")]
    texts = [_written(text) if isinstance(text, Written) else _read(text) for text in lesson.text]
    shares = "" if lesson.weights is None else f", in shares of {' : '.join(f'{w:g}' for w in lesson.weights)}"
    lines = [Line("Text", "; ".join(texts) + shares), Line("Objective", _objective(lesson))]
    start = f"the weights of {lesson.start_from}" if lesson.start_from else "fresh random weights"
    how = f", by {json.dumps(canonical(lesson.inherit))}" if lesson.inherit else ""
    lines.append(Line("Start", f"{start}{how}; seed {seed}"))
    if lesson.adapters:
        on = ", ".join(lesson.adapters.targets or ("all matrices of the layers",))
        size = f"rank {lesson.adapters.rank}, alpha {lesson.adapters.alpha:g}"
        lines.append(Line("Adapters", f"low-rank (LoRA), {size}, on {on}; merged into these weights"))
    training = lesson.training
    if training is not None:
        amount = f"{training.steps} steps of {training.batch_size} rows of {training.sequence_length} tokens"
        lines.append(Line("Length", f"{amount}, learning rate {training.optimizer.learning_rate:g}"))
    return lines


def _read(text: Text) -> str:
    part = f", {text.tokens} tokens of it" if text.tokens else ""
    return f"split {text.split} of {corpus_name(text)}{part}{_drawn(text)}"


def _written(text: Written) -> str:
    given = f" behind the first {text.prompt_tokens} of each document of {_read(text.prompts)}" if text.prompts else ""
    chosen = f", the best of {text.best_of} candidates each" if text.best_of > 1 else ""
    chosen += f", the best {text.keep:.3g} of all documents" if text.keep < 1 else ""
    judge = f" for {text.judged_by or type(text.verifier).__name__}" if text.is_judged else ""
    chosen += f", those that keep the rule {getattr(text.rule, '__name__', text.rule)}" if text.rule else ""
    how = f"searched for by {text.beams} beams" if text.beams else f"temperature {text.temperature:g}"
    marks = f", with {', '.join(type(mark).__name__ for mark in text.marks)}" if text.marks else ""
    drawn = f"{text.tokens} tokens, {how}{marks}"
    return f"text written by {text.by}{given} ({drawn}{chosen}{judge}){_drawn(text)}"


def _drawn(text: Text | Written) -> str:
    return f", {text.subsample} tokens drawn of these at random" if text.subsample else ""


def quantization_in_words(how: Any) -> str:
    """What of it is in the weights of a file, and what is not."""
    of = f"blocks of {how.block} inputs" if how.block else "every output"
    weights = f"matrices of the layers lie on a grid of {how.weights}, with a scale of {of}" if how.weights else ""
    missing = f"inputs of products were rounded to {how.activations}, token by token, which these files do not say"
    return "; ".join(part for part in (weights, missing if how.activations else "") if part)


def _objective(lesson: Lesson) -> str:
    objective = lesson.objective
    if not isinstance(objective, Objective):
        return "counting, no gradient" if objective is None else type(objective).__name__
    inside = "".join(f" + {_number(match.weight)} x {_match(match)}" for match in objective.inner)
    return _of_logits(objective, lesson) + inside


def _match(match: Match) -> str:
    """What inside the teacher is learned."""
    layers = _called(match.layers) if callable(match.layers) else ", ".join(f"{a} from {b}" for a, b in match.layers)
    return f"{' '.join(match.kind.name.split('_'))} (layers: {layers})"


def _of_logits(objective: Objective, lesson: Lesson) -> str:
    text = "cross-entropy with the text"
    if not objective.needs_scores:
        return text if objective.inner else f"{text}, no teacher"
    temperature = f"temperature {_number(objective.temperature)}"
    if objective.temperature != 1 and objective.temperature_squared:
        temperature += ", times temperature squared"
    teachers = "the running average of its own weights" if lesson.mean_teacher else " and ".join(lesson.teachers)
    divergence = f"{_called(objective.divergence)} to {teachers} at {temperature}"
    share = objective.hard_weight
    if callable(share):
        return f"(1 - w) x ({divergence}) + w x {text}, w {_number(share)}"
    return f"{1 - share:g} x ({divergence}) + {share:g} x {text}" if share else divergence


def _number(value: Any) -> str:
    """A number, or how a schedule changes it."""
    if isinstance(value, Linear):
        until = f"from step {value.after} to {value.after + value.steps}"
        return f"{value.start:g} to {value.end:g} ({type(value).__name__.lower()}, {until})"
    return _called(value) if callable(value) else f"{value:g}"


def _called(function: Any) -> str:
    """The name of a function in words, with the arguments that are bound to it."""
    if isinstance(function, partial):
        bound = ", ".join(f"{name} {value}" for name, value in function.keywords.items())
        return f"{_called(function.func)} ({bound})"
    words = str(getattr(function, "__name__", function)).split("_")
    return " ".join(word.upper() if word in ("kl", "js", "jsd") else word for word in words)


def corpus_name(text: Text) -> str:
    fields, corpus = ("name", "pattern", "text"), getattr(text.corpus, "corpus", text.corpus)
    return next((file_name(str(getattr(corpus, f))) for f in fields if hasattr(corpus, f)), "a corpus")


def lineage_tree(key: str, records: Mapping[str, Record | None]) -> list[str]:
    """The lineage as lines, from the node to its roots; a node that was drawn before is not drawn again."""
    drawn: set[str] = set()

    def below(key: str, indent: str, depth: int) -> list[str]:
        record = records.get(key)
        parents = record["parents"] if record else []
        if depth == DEPTH and parents:
            return [f"{indent}└─ ... and the {len(records.keys() - drawn)} ancestors before"]
        lines = []
        for place, parent in enumerate(parents):
            last = place == len(parents) - 1
            again = parent["key"] in drawn
            drawn.add(parent["key"])
            what = "as above" if again else _described(records[parent["key"]])
            name = f"{parent['key']} [{parent['identity'][:8]}]"
            lines.append(f"{indent}{'└─' if last else '├─'} {parent['role']}: {name} {what}")
            if not again:
                lines += below(parent["key"], indent + ("   " if last else "│  "), depth + 1)
        return lines

    drawn.add(key)
    own = records[key]
    assert own is not None
    lines = [f"{key} [{own['identity'][:8]}] {_described(own)} <- this model", *below(key, "", 1)]
    return [one_line(line).replace("`", "'") for line in lines]


def _described(record: Record | None) -> str:
    if record is None:
        return "(its record is gone: unknown)"
    if record.get("source"):
        what = f"imported from {file_name(record['source']['path'])}"
    else:
        names = dict.fromkeys(file_name(card["name"]) for card in real_texts(record))
        what = f"{record['kind']}, read {', '.join(names) or 'no real text'}"
    return f"({what}; {count(record['parameters'])} parameters)"


def real_texts(record: Record) -> list[Record]:
    """The cards of the texts that no model wrote: what a node read, and the prompts that were completed for it."""
    cards = [card if "parents" not in card else card.get("prompts") for card in record["data"]]
    return [card for card in cards if card]


def count(value: int) -> str:
    """A number of parameters in three digits: 812, 1.35 M, 70.1 B."""
    for size, letter in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if value >= size:
            return f"{value / size:.3g} {letter}"
    return str(value)


def number(value: Any) -> str:
    """A measure in four digits; what was not measured is said so, and a record's "inf" stays a word."""
    if value is None:
        return "not measured"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if isinstance(value, float) else str(value)


def plain(value: Any) -> str:
    """Text from outside inside Markdown: one line, in which nothing is markup."""
    text = one_line(str(value)).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([\\|`*\[\]])", r"\\\1", text)


def one_line(value: Any) -> Any:
    """Without line breaks and without characters that cannot be printed, which YAML refuses."""
    if isinstance(value, list):
        return [one_line(item) for item in value]
    return " ".join("".join(c if c.isprintable() else " " for c in value).split())


def file_name(name: str) -> str:
    """A path by its last part: where a file lay on one machine is nobody's business."""
    return (PurePath(name).name or name) if name.startswith(("/", "~", ".")) or ("/" in name and "*" in name) else name


def without_places(value: Any) -> Any:
    """A config whose absolute paths are only names."""
    if isinstance(value, dict):
        return {key: without_places(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_places(item) for item in value]
    return file_name(value) if isinstance(value, str) else value
