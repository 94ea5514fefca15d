"""The order of the house: who may import whom, what starts fast, and that every field and example is real."""

import ast
import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "epigone"

MAY_IMPORT = {
    "errors": set(),
    "identity": {"errors"},
    "lineage": {"errors", "identity", "questions", "texts"},
    "questions": {"errors", "identity", "texts"},
    "texts": {"errors", "identity"},
    "regimes": {"errors", "lineage"},
    "pretrained": {
        "errors",
        "identity",
        "lineage",
        "storage",
        "store",
        "materials",
        "processes",
        "data",
        "models",
        "interchange",
        "training",
    },
    "starting": {"errors", "lineage", "materials", "data", "models"},
    "opened": {"errors", "identity", "lineage", "storage", "store", "materials", "data", "models", "training"},
    "families": {"errors", "lineage"},
    "sampling": {"errors", "models"},
    "arena": {"errors", "data", "evaluate", "models", "opened", "sampling", "storage"},
    "storage": {"errors"},
    "store": {"errors", "identity", "lineage", "storage"},
    "view": {"lineage"},
    "overrides": {"errors", "lineage"},
    "planning": {"devices", "errors", "lineage", "materials", "models", "lessons", "teachers", "training", "plan"},
    "materials": {
        "errors",
        "identity",
        "lineage",
        "storage",
        "store",
        "data",
        "evaluate",
        "models",
        "sampling",
        "training",
        "verifiers",
        "writing",
    },
    "writing": {"errors", "lineage", "models"},
    "measure": {"arena", "errors", "lineage", "materials", "evaluate", "models", "theory", "view"},
    "theory": {"identity", "lineage", "materials", "evaluate", "models", "writing"},
    "verifiers": {"lineage", "evaluate", "models", "writing"},
    "models": {"devices", "errors", "identity"},
    "interchange": {"errors", "models", "storage"},
    "data": {"errors", "models", "storage"},
    "lessons": {"devices", "errors", "identity"},
    "teachers": {"errors", "models", "lessons", "data", "sampling", "storage"},
    "training": {"devices", "errors", "identity", "models", "lessons", "teachers", "data", "sampling", "storage"},
    "evaluate": {"errors", "models"},
    "report": {"errors", "storage"},
    "devices": set(),
    "runtime": set(),
    "processes": {"errors", "watchdog"},
    "watchdog": {"errors", "liveness"},
    "liveness": set(),
}
"""Rooms that may be imported, beside a room's own files. What is not named here stands above all of these."""


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def imports(path: Path) -> set[str]:
    """Rooms of Epigone that a file imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "epigone":
            names = [f"epigone.{alias.name}" for alias in node.names] if node.module == "epigone" else [node.module]
            found |= {room(name) for name in names}
        elif isinstance(node, ast.Import):
            found |= {room(alias.name) for alias in node.names if alias.name.startswith("epigone.")}
    return {name for name in found if name and not name.startswith("_")}


@pytest.mark.parametrize("name", sorted(MAY_IMPORT))
def test_imports_point_one_way(name):
    place = SOURCE / name
    files = sorted(place.rglob("*.py")) if place.is_dir() else [place.with_suffix(".py")]
    assert files
    for path in files:
        wrong = imports(path) - MAY_IMPORT[name] - {name}
        assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}, which {name} may not know"


def test_only_one_file_knows_orbax():
    knowing = [path.name for path in SOURCE.rglob("*.py") if re.search(r"import orbax|from orbax", path.read_text())]
    assert knowing == ["checkpoint.py"]


@pytest.mark.parametrize("module", ["cli", "lineage", "data.corpora", "models.ngram", "evaluate", "report"])
def test_jax_and_tensorflow_are_not_imported_before_they_are_needed(module):
    code = f"import epigone.{module}, sys; print('jax' in sys.modules, 'tensorflow' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.split() == ["False", "False"]


def test_help_starts_in_under_a_second():
    """User and system time, which other work on the machine does not stretch."""
    code = "import os, sys; from epigone.cli import main; main(['--help']);print(sum(os.times()[:2]), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stderr) < 1.0


def documented_dataclasses():
    """Every dataclass with an Attributes section, and its public fields."""
    for path in sorted(SOURCE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef) and "Attributes:" in (ast.get_docstring(node) or ""):
                fields = [entry for entry in node.body if isinstance(entry, ast.AnnAssign)]
                plain = [entry for entry in fields if "ClassVar" not in ast.unparse(entry.annotation)]
                names = [ast.unparse(entry.target) for entry in plain]
                public = [name for name in names if not name.startswith("_")]
                yield pytest.param(ast.get_docstring(node), public, id=f"{path.stem}.{node.name}")


@pytest.mark.parametrize(("text", "names"), documented_dataclasses())
def test_every_field_is_documented_and_read_somewhere(text, names):
    section = text.partition("Attributes:")[2]
    everything = "\n".join(path.read_text() for path in SOURCE.rglob("*.py"))
    for name in names:
        assert re.search(rf"^\s*{name}\s*(\([^)]*\))?:", section, flags=re.M), f"{name} is not documented"
        assert re.search(rf"\.{name}\b|\b{name}: [^\n]*,\n", everything), f"nothing reads {name}"


def test_every_config_says_what_it_is_for():
    configs = sorted((ROOT / "configs").rglob("*.py"))
    assert configs
    for path in configs:
        text = ast.get_docstring(ast.parse(path.read_text())) or ""
        for word in ("What", "Why", "Command", "Cost", "Expect"):
            assert re.search(rf"^{word}\b", text, flags=re.M), f"{path.name} does not say: {word}"


def test_dataclasses_of_the_lineage_are_frozen():
    from epigone import lineage

    kinds = [k for k in vars(lineage).values() if isinstance(k, type) and dataclasses.is_dataclass(k)]
    assert len(kinds) >= 6
    assert all(k.__dataclass_params__.frozen for k in kinds)
