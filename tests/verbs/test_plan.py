"""`epigone plan`: what it prints and writes, and what it refuses."""

import json
from pathlib import Path

import pytest

from epigone.cli import main
from epigone.models.rules import Sharding
from epigone.planning import topologies
from epigone.verbs.run import read_config

CONFIGS = Path(__file__).parents[2] / "configs"
PLANNED = sorted((CONFIGS / "planned").glob("*.py"))


def plan(config, tmp_path, *more):
    return main(["plan", str(config), "--no-compile", "--run", str(tmp_path / "run"), *more])


@pytest.mark.parametrize("config", PLANNED, ids=lambda path: path.stem)
def test_every_planned_config_fits_by_formula_too(config, tmp_path, capsys):
    assert plan(config, tmp_path, "--out", str(tmp_path / "plan.json")) == 0
    told = json.loads((tmp_path / "plan.json").read_text())
    assert told["memory"]["fits"]
    assert told["memory"]["used"] == pytest.approx(sum(told["memory"]["kinds"].values()))
    assert told["mesh"]["data"] * told["mesh"]["fsdp"] * told["mesh"]["tensor"] == told["topology"]["devices"]
    assert 0 < told["mfu"]["lowest"] <= told["mfu"]["expected"] <= told["mfu"]["highest"] < 1.2
    assert {"parameters", "flops", "exchanged", "run", "scores"} <= set(told)
    kernel = {"cuda": "cudnn", "tpu": "splash"}["cuda" if told["topology"]["chip"]["dimensions"] == 0 else "tpu"]
    assert all(said.startswith(kernel) for said in told["attention"].values())
    printed = " ".join(capsys.readouterr().out.split())
    assert "bound by" in printed
    assert f"epigone run {config}" in printed


def test_sizes_are_those_that_are_published(tmp_path):
    sizes = {}
    for config in PLANNED:
        plan(config, tmp_path, "--out", str(tmp_path / "plan.json"))
        told = json.loads((tmp_path / "plan.json").read_text())["parameters"]
        sizes[config.stem] = tuple(round(n / 1e9, 2) for n in (told["student"], *told["teachers"]))
    assert sizes == {
        "gemma3_27b_to_1b": (1.0, 27.01),
        "llama_70b_to_8b": (8.03, 70.55),
        "qwen3_32b_to_1_7b": (1.72, 32.76),
        "smollm2_1_7b_to_135m": (0.13, 1.71),
    }


def test_a_row_for_documents(tmp_path, capsys):
    assert plan(CONFIGS / "planned" / "smollm2_1_7b_to_135m.py", tmp_path, "--markdown") == 0
    header, rule, row = capsys.readouterr().out.strip().splitlines()
    assert header.count("|") == rule.count("|") == row.count("|") == 11
    assert row.startswith("| smollm2-1.7b-to-135m | 8 x v5e | 1 x 8 x 1, 8 |")


def test_the_command_that_it_gives_is_that_mesh(tmp_path, capsys):
    """Beside what the config itself is made for: another mesh undoes that."""
    config = CONFIGS / "planned" / "llama_70b_to_8b.py"
    other = ["--hardware.fsdp", "16", "--hardware.tensor", "1", "--hardware.microbatches", "1"]
    rules = ["--hardware.student.N", "--hardware.teacher.D", "data", "fsdp"]
    assert plan(config, tmp_path, "--topology", "h100:16", *other, *rules) == 0
    lines = capsys.readouterr().out.splitlines()
    (command,) = [line for line in lines if line.startswith("epigone run")]
    given = read_config(command.split()[2:], "run")[2].hardware
    assert (given.data, given.fsdp, given.tensor, given.microbatches) == (1, 16, 1, 1)
    assert (given.student, given.teacher) == (Sharding(N=()), Sharding(D=("data", "fsdp")))
    assert plan(config, tmp_path) == 0
    assert f"epigone run {config} " in capsys.readouterr().out, "nothing to say beside the config's own"


def test_a_search_ranks_what_it_tried(tmp_path, capsys):
    config = CONFIGS / "inside.py"
    few = ["--node", "contrast@1", "--set", "contrast.lesson.training.batch_size=2"]  # every way is traced
    assert plan(config, tmp_path, "--search", "--topology", "h100:2", "--price", "2", *few) == 0
    out = tmp_path / "run" / "plans" / "contrast@1-h100-2.json"
    told = json.loads(out.read_text())
    assert len(told["search"]) > 4
    assert told["run"]["cost"] == pytest.approx(2 * told["run"]["chip_hours"])
    assert "ways that were tried" in capsys.readouterr().out


def test_what_does_not_fit_is_said_and_is_a_failure(tmp_path, capsys):
    config = CONFIGS / "planned" / "llama_70b_to_8b.py"
    mesh = ["--topology", "v5e:2x2", "--hardware.fsdp", "4", "--hardware.tensor", "1", "--hardware.microbatches", "1"]
    assert plan(config, tmp_path, *mesh) == 2
    said = capsys.readouterr()
    assert "does not fit v5e:2x2" in said.err
    assert said.err.strip().count("\n") == 0
    assert "too large" in said.out
    assert plan(config, tmp_path, "--markdown", *mesh) == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--topology", "v9:4x4"], "topology 'v9:4x4' is none"),
        ([], "say on which devices"),
        (["--topology", "h100:8", "--price", "-1"], "is no price"),
        (["--topology", "h100:8", "--hardware.fsdp", "4"], "has 4 devices, and h100:8 has 8"),
        (["--topology", "h100:8", "--node", "nobody@1"], "no node 'nobody@1'"),
        (["--topology", "h100:8", "--node", "trigram@0"], "'trigram@0' is not trained step by step"),
    ],
)
def test_bad_input_is_one_line(arguments, said, tmp_path, capsys):
    assert plan(CONFIGS / "quickstart.py", tmp_path, *arguments) == 2
    error = capsys.readouterr().err.strip()
    assert said in error
    assert "\n" not in error


def test_without_the_compiler_for_tpus_the_line_says_what_to_do(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(topologies, "find_spec", lambda name: None)
    config = CONFIGS / "planned" / "smollm2_1_7b_to_135m.py"
    assert main(["plan", str(config), "--run", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "pip install 'epigone[plan]', or plan by --no-compile" in said


def test_weights_that_are_not_here_can_be_planned_and_not_run(tmp_path, capsys):
    assert main(["run", str(CONFIGS / "planned" / "smollm2_1_7b_to_135m.py"), "--run", str(tmp_path / "run")]) == 2
    assert "HuggingFaceTB/SmolLM2-1.7B is not here" in capsys.readouterr().err
