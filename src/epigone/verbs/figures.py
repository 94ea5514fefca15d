"""What `epigone evaluate` found, as tables to be read."""

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import RenderableType
from rich.table import Table

ROWS: tuple[tuple[str, str, str], ...] = (
    ("perplexity", "perplexity", "{:,.3f}"),
    ("nats_per_token", "nats a token", "{:.4f}"),
    ("nats_per_possible_token", "nats a possible token", "{:.4f}"),
    ("impossible", "impossible tokens", "{:.2%}"),
    ("nats_per_end", "nats an end of document", "{:.4f}"),
    ("bits_per_byte", "bits a byte", "{:.4f}"),
    ("ece", "ECE, 15 equal bins", "{:.4f}"),
    ("ece_adaptive", "ECE, equal counts", "{:.4f}"),
    ("accuracy", "accuracy", "{:.2%}"),
    ("tokens_evaluated", "tokens, ends included", "{:,.0f}"),
    ("seconds", "seconds", "{:,.1f}"),
    ("tokens_per_second", "tokens a second", "{:,.0f}"),
)
"""Figure, its name for a reader, its form."""

AGREEMENT = (
    ("top1", "same first choice", "{:.2%}"),
    ("top1_kappa", "kappa of first choices", "{:.4f}"),
    ("top5", "shared among the first five", "{:.2%}"),
    ("forward_kl", "KL(teacher, node), nats", "{:.4f}"),
    ("reverse_kl", "KL(node, teacher), nats", "{:.4f}"),
    ("js", "Jensen-Shannon, nats", "{:.4f}"),
)


def tables(found: Mapping[str, Any]) -> Iterator[RenderableType]:
    """The node's figures with the teacher's beside them, agreement, tasks, and what could not be measured."""
    if "text" in found:
        yield _quality(found)
    if "agreement" in found:
        yield _agreement(found)
    if "tasks" in found:
        yield _tasks(found)
    yield from found.get("notes", ())


def _quality(found: Mapping[str, Any]) -> Table:
    roles = [role for role in ("node", "teacher") if role in found]
    table = Table(title=f"{found['text'].get('name')}, {found['text'].get('split')}: {found['documents']:,} documents")
    table.add_column("")
    for role in roles:
        table.add_column(found[role]["key"], justify="right")
    difference = found.get("difference", {})
    if difference:
        table.add_column("difference", justify="right")
    for name, title, form in ROWS:
        if any(found[role].get(name) for role in roles):  # a share of impossible tokens of 0 goes without saying
            cells = [_with_error(found[role], name, form) for role in roles]
            apart = _with_error(difference, name, "{:+.4f}")
            table.add_row(title, *cells, *([apart] if difference else []))
    return table


def _with_error(figures: Mapping[str, Any], name: str, form: str) -> str:
    """A figure, with its standard error if it has one; a dash where it is absent."""
    if name not in figures:
        return "-" if "key" in figures else ""
    error = figures.get(f"{name}_error")
    return form.format(figures[name]) + ("" if error is None else f" ± {error:.4f}")


def _agreement(found: Mapping[str, Any]) -> Table:
    table = Table("", title=f"{found['node']['key']} and {found['teacher']['key']}")
    table.add_column("agreement", justify="right")
    for name, title, form in AGREEMENT:
        if name in found["agreement"]:
            table.add_row(title, form.format(found["agreement"][name]))
    return table


def _tasks(found: Mapping[str, Any]) -> Table:
    table = Table("task", "figure", title=f"{found['node']['key']}: lm-evaluation-harness")
    table.add_column("value", justify="right")
    for task, figures in found["tasks"].items():
        for name, value in figures.items():
            if "_stderr" not in name and name != "sample_len":
                metric, comma, kind = name.partition(",")
                error = figures.get(f"{metric}_stderr{comma}{kind}")
                table.add_row(task, name, f"{value:.4f}" + ("" if error is None else f" ± {error:.4f}"))
    return table
