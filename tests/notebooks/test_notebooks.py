"""Every notebook runs from top to bottom on a small run, shows what it promises, and is stored without outputs."""

import base64
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path

import nbformat
import pytest
from ipykernel.kernelspec import write_kernel_spec
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from report.synthetic_run import quickstart, record, write_run
from tiny import Silent, few_populations, shrunk

from epigone.grow import grow
from epigone.lineage import Lineage
from epigone.verbs.run import load_config

NOTEBOOKS = Path(__file__).parent.parent.parent / "notebooks"
CONFIGS = NOTEBOOKS.parent / "configs"
ALL = sorted(NOTEBOOKS.glob("*.ipynb"))


def execute(path: Path, run: Path, home: Path, monkeypatch) -> nbformat.NotebookNode:
    """The notebook after a run in a kernel of this very interpreter, whatever kernels the machine has installed."""
    write_kernel_spec(home / "kernels" / "python3")
    monkeypatch.setenv("EPIGONE_RUN", str(run))
    monkeypatch.setenv("IPYTHONDIR", str(home / "ipython"))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(home / "runtime"))
    monkeypatch.delenv("MPLBACKEND", raising=False)
    specs = KernelSpecManager(kernel_dirs=[str(home / "kernels")], ensure_native_kernel=False)
    manager = AsyncKernelManager(kernel_name="python3", kernel_spec_manager=specs)
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(path.parent)}}
    return NotebookClient(notebook, km=manager, timeout=120, resources=resources).execute()


def outputs(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def printed(notebook: nbformat.NotebookNode) -> str:
    return "".join(output.text for output in outputs(notebook) if output.output_type == "stream")


def shown(notebook: nbformat.NotebookNode, kind: str) -> list[str]:
    return [output.data[kind] for output in outputs(notebook) if kind in output.get("data", {})]


def picture_size(png: str) -> tuple[int, int]:
    """Width and height in pixels, from the header of a base64 PNG file."""
    return struct.unpack(">II", base64.b64decode(png)[16:24])


def small_run(directory: Path, generations: int = 4, seeds: int = 2) -> Path:
    entries = quickstart(generations, seeds)
    return write_run(directory / "run", entries, [record(entry) for entry in entries])


def grown_run(
    directory: Path, config: str, few: Callable[[Lineage], Lineage] = lambda whole: whole, **knobs: int
) -> Path:
    """A shipped config, shrunk and grown."""
    lineage = few(shrunk(load_config(CONFIGS / f"{config}.py")(**knobs), write_tokens=600))
    grow(lineage, directory / "run", view=Silent())
    return directory / "run"


POPULATIONS = ("t1-d0-m8-c3-r0", "t1-d0.5-m8-c3-r0", "t2-d0.5-m8-c3-r0", "t1-d1-m8-c3-r0", "t2-d1-m8-c3-r0")


few = partial(few_populations, names=POPULATIONS)

RUNS = {
    "01_trigram": small_run,
    "02_dark_knowledge": small_run,
    "03_collapse": partial(grown_run, config="generations/trigrams", seeds=1, generations=2, tokens=2_000),
    "04_population": partial(grown_run, config="sameness", few=few, seeds=1, teacher_tokens=800, tokens=400),
}
"""Of each notebook a small run that it can read."""

TOLD = {
    "01_trigram": ("perplexity, trigram · replace: ×", "generation 0 to 4"),
    "02_dark_knowledge": (
        "perplexity, transformer · accumulate: ×",
        "student@1 minus control@1, perplexity: -",
        "95 % interval",
        "pupil@1 minus self-replace@1: ",
        "words shared with the teacher",
    ),
    "03_collapse": ("real only", "writing what smoothing made up", "kept_of_real", "after one round"),
    "04_population": ("control, models that they are worth", "teachers 1, dose", "by dose: 0"),
}
"""What each prints, among other things."""


def test_there_are_notebooks():
    assert {path.stem for path in ALL} == set(RUNS)


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_a_notebook_is_valid_and_stored_without_outputs(path):
    notebook = nbformat.read(path, as_version=nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    assert not outputs(notebook)
    assert all(cell.execution_count is None for cell in notebook.cells if cell.cell_type == "code")
    assert path.stat().st_size < 100_000


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_a_notebook_runs_from_top_to_bottom(path, tmp_path, monkeypatch):
    done = execute(path, RUNS[path.stem](tmp_path), tmp_path, monkeypatch)
    assert not [output for output in outputs(done) if output.output_type == "error"]
    assert not [output.text for output in outputs(done) if output.get("name") == "stderr"]
    assert shown(done, "image/png")
    for words in TOLD[path.stem]:
        assert words in printed(done), words


def test_copies_of_copies_are_drawn_and_read(tmp_path, monkeypatch):
    done = execute(NOTEBOOKS / "01_trigram.ipynb", small_run(tmp_path), tmp_path, monkeypatch)
    figures = shown(done, "image/png")
    assert len(figures) == 3
    assert all(width > 600 and height > 200 for width, height in map(picture_size, figures))
    tables = "".join(shown(done, "text/html"))
    for cell in (
        "trigram · replace @4",
        "trigram · accumulate @4",
        "written by trigram@0",
        "coherence: seen-3",
        ", down",
    ):
        assert cell in tables, cell
    assert "<script>" not in tables


def test_one_seed_gives_no_interval_and_no_verdict(tmp_path, monkeypatch):
    done = execute(NOTEBOOKS / "02_dark_knowledge.ipynb", small_run(tmp_path, 2, 1), tmp_path, monkeypatch)
    assert "one seed: no interval, no verdict" in printed(done)
    assert "95 %" not in printed(done)


def unfinished(directory: Path) -> Path:
    entries = quickstart(1, 1)
    return write_run(directory / "run", entries, [record(entry) for entry in entries[:-1]])


@pytest.mark.parametrize(
    ("make", "words"),
    [(lambda directory: directory / "none", "epigone run configs/quickstart.py"), (unfinished, "grows the rest")],
    ids=["missing", "unfinished"],
)
def test_without_a_finished_run_the_first_cell_says_in_one_line_what_to_do(make, words, tmp_path, monkeypatch):
    run = make(tmp_path)
    with pytest.raises(CellExecutionError) as raised:
        execute(NOTEBOOKS / "01_trigram.ipynb", run, tmp_path, monkeypatch)
    message = raised.value.evalue
    assert str(run) in message
    assert words in message
    assert len(message.splitlines()) == 1
