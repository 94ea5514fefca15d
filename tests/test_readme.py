"""Every command of the README, run in a folder of its own on a quickstart that is shrunk."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import hf_models
import pytest
import tiny

from epigone.cli import VERBS, main
from epigone.data.tokenizers import Words

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
MEASURED = {"text.tokens": 1000, "write_tokens": 300, "contexts": 20}
SHRUNK = ["--seeds", "1", "--generations", "1", "--scale", "0.004"]
READ = {"teacher.lesson.text.0": 20_000, "pupil.lesson.text.0": 2_000, "self-replace.lesson.text.0": 2_000}
READ |= {"self-accumulate.lesson.text.1": 2_000}
SMALL = {"model.layers": 1, "model.model_size": 16, "model.heads": 2, "lesson.training.batch_size": 2}
SMALL |= {"lesson.training.sequence_length": 32}
TRANSFORMERS = ("teacher", "student", "control", "self", "self-replace", "self-accumulate", "pupil")
SHRUNK += [word for name, size in MEASURED.items() for word in ("--set", f"evaluation.{name}={size}")]
SHRUNK += [word for name, size in READ.items() for word in ("--set", f"{name}.tokens={size}")]
SHRUNK += [word for node in TRANSFORMERS for name, size in SMALL.items() for word in ("--set", f"{node}.{name}={size}")]


def commands(first_word: str) -> list[str]:
    """Lines of the README's code blocks that begin with a word, without their comments."""
    blocks = re.findall(r"```\n(.*?)```", README, flags=re.S)
    lines = [line.partition("#")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line.startswith(first_word)]


def shrunk(words: list[str]) -> list[str]:
    """The same command on a smaller lineage; one node of it on a mesh, in a run of its own, or where a value is set."""
    if words[0] == "serve":
        return [*words, "--port", "0"]
    if words[0] != "run" or {"--help", "--dry-run"} & set(words):
        return words
    if any(word.startswith("--hardware") for word in words):
        words = [*words, "--node", "teacher@0", "--run", "runs/mesh"]
    if "--set" in words:
        words = [*words, "--node", "teacher@0"]
    return [*words, *(SHRUNK[2:] if "--seeds" in words else SHRUNK)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the repository's configs and launchers and a model of somebody, for the README's commands."""
    folder = tmp_path_factory.mktemp("readme")
    model = folder / "path" / "to" / "model"
    hf_models.write(model, "smollm2")
    Words().build(tiny.sentences(200)).export(model)
    for name in ("configs", "launch"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def test_the_readme_has_commands_of_every_verb():
    verbs = {command.split()[1] for command in commands("epigone ")}
    assert verbs == set(VERBS)
    assert commands("make ") == ["make run", "make test", "make smollm2"]
    assert set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.M)) >= {"run", "test", "lint"}


def test_every_epigone_command_works(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    monkeypatch.setattr("uvicorn.Server.run", lambda *_, sockets: served.extend(sockets))
    served = []
    with tiny.few_verses(every=8):  # the helpers of --jobs read what the first command has prepared
        for command in commands("epigone "):
            assert main(shrunk(shlex.split(command)[1:])) == 0, command + "\n" + capsys.readouterr().err
    assert len(served) == 1
    shown = capsys.readouterr().out
    assert "nodes grown in" in shown
    assert "quickstart/teacher@0 answers at http://127.0.0.1:" in shown
    assert not re.search(r"nodes are done", shown)  # every command had something to do
    assert {"report.html", "results.json", "results.csv"} <= {p.name for p in (folder / "runs/quickstart").iterdir()}


def test_every_launch_command_works(folder):
    for command in commands("python launch/"):
        words = shlex.split(command)
        own = [*words[: words.index("--")], "--dry-run", *words[words.index("--") :]]
        done = subprocess.run([sys.executable, *own[1:]], cwd=folder, capture_output=True, text=True, check=True)
        assert "epigone run configs/quickstart.py" in done.stdout


def test_every_file_that_is_named_exists():
    named = re.findall(r"`((?:docs|benchmarks|tests|configs|notebooks|launch)/[\w./]+)`", README)
    named += re.findall(r"\]\(([\w./]+)\)", README)
    assert len(named) > 5
    for name in named:
        assert (ROOT / name).exists(), f"the README names {name}, which is not there"
