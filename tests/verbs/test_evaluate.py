"""`epigone evaluate`: its figures are the record's own and those of brute force; every bad input is one line."""

import json
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import tiny
import yaml

from epigone.cli import main
from epigone.data import corpora
from epigone.evaluate import compare_models, evaluation_contexts
from epigone.opened import open_node
from epigone.verbs.evaluate import Evaluate, examined
from epigone.verbs.held_out import part_of, read_held_out

CONFIG = tiny.CONFIG.replace(
    "nodes = [trigram, *copies, teacher, *fan_out(teacher, [student]), reader]",
    """of = lambda algorithm: TrainedTokenizer(algorithm, Text(CORPUS))
    counted = change(trigram.lesson, validation=None)
    others = [Node(n, 0, NGram(), of(t), counted) for n, t in (("letters", Bytes()), ("pieces", BPE(300)))]
    nodes = [trigram, teacher, *fan_out(teacher, [student]), *others]""",
).replace("import Words", "import BPE, Bytes, Words")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("examined")
    config = tiny.write_config(folder, CONFIG)
    assert main(["run", str(config), "--run", str(folder / "runs" / "tiny")]) == 0
    return folder


def on_corpus(folder, node, **more):
    """The arguments for a node on the corpus that the lineage reads."""
    return Evaluate(node, str(folder / "corpus.txt"), run=folder / "runs" / "tiny", **more)


def record(folder, key):
    (path,) = (folder / "runs" / "tiny" / "nodes").glob(f"{key}-*/record.json")
    return json.loads(path.read_text())


@pytest.mark.parametrize("key", ["trigram@0", "student@1", "letters@0"])
def test_the_figures_are_those_of_the_record(folder, key):
    """The same split, places and seed as the lineage's evaluation."""
    found = examined(on_corpus(folder, key, contexts=50))
    wanted = record(folder, key)["metrics"]
    assert found["node"]["identity"] == record(folder, key)["identity"]
    for name in ("perplexity", "nats_per_token", "nats_per_token_error", "ece", "ece_adaptive", "accuracy"):
        assert found["node"][name] == pytest.approx(wanted[name], rel=1e-5), name
    assert found["node"].get("bits_per_byte", 0) == pytest.approx(wanted.get("bits_per_byte", 0), rel=1e-5)
    assert ("bits_per_byte" in found["node"]) == (key == "letters@0")
    assert found["node"]["tokens_evaluated"] == wanted["tokens_evaluated"]
    assert found["node"]["tokens_per_second"] * found["node"]["seconds"] == pytest.approx(wanted["tokens_evaluated"])


def test_a_tokenizer_that_loses_text_has_no_bits_a_byte_and_says_why(folder):
    found = examined(on_corpus(folder, "trigram@0", contexts=5))
    assert "bits_per_byte" not in found["node"]
    (note,) = found["notes"]
    assert "bits a byte" in note
    assert f"of {found['documents']} documents" in note
    assert examined(on_corpus(folder, "letters@0", contexts=5))["notes"] == []


def test_a_part_of_the_text_is_the_part_that_a_lineage_takes(folder):
    opened = open_node("pieces", folder / "runs" / "tiny")
    whole = read_held_out(str(folder / "corpus.txt"), "test", folder / "runs" / "data")
    documents = corpora.slice_documents(opened.tokenizer.encode_batch(whole.texts), 0, 100)
    part = part_of(whole, opened.tokenizer, 100)
    assert [opened.tokenizer.decode(ids) for ids in documents] == list(part.texts)

    found = examined(on_corpus(folder, "pieces", tokens=100, contexts=5))
    nats = -sum(float(scores.sum()) for scores in opened.model.log_probs(documents))
    ends = -np.mean([scores[-1] for scores in opened.model.log_probs(documents)])
    assert found["node"]["nats_per_end"] == pytest.approx(ends)
    assert found["documents"] == len(documents) < len(whole.texts)
    assert found["node"]["bits_per_byte"] == pytest.approx(nats / np.log(2) / sum(len(t.encode()) for t in part.texts))


def test_beside_the_teacher_agreement_and_a_paired_difference(folder):
    found = examined(on_corpus(folder, "student@1", teacher="teacher", contexts=50))
    student, teacher = (open_node(key, folder / "runs" / "tiny") for key in ("student@1", "teacher@0"))
    texts = read_held_out(str(folder / "corpus.txt"), "test", folder / "runs" / "data").texts
    documents = student.tokenizer.encode_batch(texts)
    places = evaluation_contexts(documents, 50, 0, longest=31)
    assert found["agreement"] == pytest.approx(compare_models(student.model, teacher.model, places.prefixes), rel=1e-4)
    assert {"top1", "top5", "forward_kl", "reverse_kl", "js"} <= set(found["agreement"])

    own, other = (np.array([-s.sum() for s in n.model.log_probs(documents)], np.float64) for n in (student, teacher))
    sizes = np.array([len(document) + 1 for document in documents])
    gap = found["difference"]["nats_per_token"]
    assert gap == pytest.approx((own - other).sum() / sizes.sum(), rel=1e-3)
    assert gap == pytest.approx(found["node"]["nats_per_token"] - found["teacher"]["nats_per_token"], rel=1e-3)
    draw = np.random.default_rng(0)
    again = [(own - other)[i].sum() / sizes[i].sum() for i in draw.integers(0, len(sizes), (2000, len(sizes)))]
    assert found["difference"]["nats_per_token_error"] == pytest.approx(np.std(again), rel=0.25)
    apart = np.hypot(*(found[role]["nats_per_token_error"] for role in ("node", "teacher")))
    assert found["difference"]["nats_per_token_error"] < apart, "pairs tell more than two measures apart"
    for role, key in (("node", "student@1"), ("teacher", "teacher@0")):
        assert found[role]["ece"] == pytest.approx(record(folder, key)["metrics"]["ece"], rel=1e-4)


def test_two_tokenizers_compare_by_the_byte_alone(folder):
    found = examined(on_corpus(folder, "pieces", teacher="letters", contexts=20))
    assert "agreement" not in found
    assert set(found["difference"]) == {"bits_per_byte", "bits_per_byte_error"}
    gap = found["node"]["bits_per_byte"] - found["teacher"]["bits_per_byte"]
    assert found["difference"]["bits_per_byte"] == pytest.approx(gap)
    (note,) = found["notes"]
    assert "pieces@0" in note
    assert "letters@0" in note
    assert all("ece" in found[role] for role in ("node", "teacher"))


def test_splits_folders_and_patterns(folder, tmp_path):
    data = tmp_path / "data"
    texts = tiny.sentences(40)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "one.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in texts))
    whole = read_held_out(str(tmp_path / "a"), "all", data)
    assert list(whole.texts) == texts
    assert read_held_out(str(tmp_path / "a" / "*.jsonl"), "all", data).texts == whole.texts
    parts = [read_held_out(str(tmp_path / "a"), split, data).texts for split in ("train", "test")]
    assert set(parts[0]) | set(parts[1]) < set(whole.texts)
    assert not set(parts[0]) & set(parts[1])


def test_the_verb_prints_tables_and_writes_json(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "120")
    out = tmp_path / "found.json"
    arguments = ["student@1", "--teacher", "teacher@0", "--on", "corpus.txt", "--contexts", "20", "--json", str(out)]
    assert main(["evaluate", *arguments]) == 0
    shown = capsys.readouterr().out
    found = json.loads(out.read_text())
    for text in ("student@1", "teacher@0", f"{found['node']['perplexity']:,.3f}", "ECE", "Jensen-Shannon", "±"):
        assert text in shown
    assert "bits a byte" in shown  # why there are none
    assert found["text"]["split"] == "test"


def test_a_mesh_changes_no_figure(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    asked = ["evaluate", "student", "--on", "corpus.txt", "--tokens", "200", "--contexts", "20"]
    for name, mesh in (("one", []), ("four", ["--hardware.data", "2", "--hardware.tensor", "2"])):
        assert main([*asked, *mesh, "--json", str(tmp_path / name)]) == 0
    one, four = (json.loads((tmp_path / name).read_text())["node"] for name in ("one", "four"))
    assert one.keys() == four.keys()
    for name in ("nats_per_token", "nats_per_end", "ece", "accuracy"):
        assert four[name] == pytest.approx(one[name], rel=1e-4), name


def test_tasks_of_the_harness(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [{"question": "The old cat", "options": [" sees", " king"], "answer": 0}] * 3
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = {
        "task": "tiny_choice",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "question",
        "doc_to_choice": "options",
        "doc_to_target": "answer",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (tmp_path / "choice.yaml").write_text(yaml.safe_dump(task))
    run, out = folder / "runs" / "tiny", tmp_path / "found.json"
    node = open_node("trigram", run)
    scores = node.model.next_log_probs([node.tokenizer.encode("The old cat")])[0]
    right = scores[node.tokenizer.encode("sees")[0]] > scores[node.tokenizer.encode("king")[0]]
    arguments = ["trigram", "--run", str(run), "--tasks", str(tmp_path / "choice.yaml"), "--json", str(out)]
    assert main(["evaluate", *arguments]) == 0
    assert json.loads(out.read_text())["tasks"]["tiny_choice"]["acc"] == float(right)
    assert "tiny_choice" in capsys.readouterr().out


WRONG = {
    "no text and no task": (["trigram"], "--on"),
    "no such node": (["trigramm", "--on", "corpus.txt"], "did you mean 'trigram@0'"),
    "no such teacher": (["trigram", "--teacher", "teachr", "--on", "corpus.txt"], "teachr"),
    "a teacher without a text": (["trigram", "--teacher", "teacher", "--tasks", "x.yaml"], "--on"),
    "no such text": (["trigram", "--on", "bbbe"], "bbbe"),
    "no such split": (["trigram", "--on", "corpus.txt", "--split", "tst"], "no split 'tst'"),
    "an empty folder": (["trigram", "--on", "empty"], "no text"),
    "too few tokens": (["trigram", "--on", "corpus.txt", "--tokens", "10000000"], "too few"),
    "no tokens": (["trigram", "--on", "corpus.txt", "--tokens", "0"], "tokens=0"),
    "no places": (["trigram", "--on", "corpus.txt", "--contexts", "0"], "contexts=0"),
    "a seed out of range": (["trigram", "--on", "corpus.txt", "--seed", "-1"], "seed=-1"),
    "no folder for the file": (["trigram", "--on", "corpus.txt", "--json", "no/where.json"], "no folder 'no'"),
    "a folder for a file": (["trigram", "--on", "corpus.txt", "--json", "empty"], "--json empty is a folder"),
    "no such task file": (["trigram", "--tasks", "none.yaml"], "none.yaml"),
    "a task file that is none": (["trigram", "--tasks", "broken.yaml"], "broken.yaml"),
}


@pytest.mark.parametrize("case", WRONG)
def test_bad_input_is_one_line(case, folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    (folder / "empty").mkdir(exist_ok=True)
    (folder / "broken.yaml").write_text("- just\n- a list\n")
    arguments, said = WRONG[case]
    assert main(["evaluate", *arguments]) == 2
    shown = capsys.readouterr().err
    lines = [line for line in shown.splitlines() if line.startswith("epigone: ")]
    assert len(lines) == 1, shown
    assert "Traceback" not in shown
    assert said in lines[0]


def test_without_the_harness_one_line_says_what_to_install(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    for module in ("lm_eval", "lm_eval.tasks"):
        monkeypatch.setitem(sys.modules, module, None)
    (folder / "some.yaml").touch()
    assert main(["evaluate", "trigram", "--tasks", "some.yaml"]) == 2
    assert "pip install .[harness]" in capsys.readouterr().err


def test_what_counts_is_evaluated_without_jax(folder):
    code = (
        "import sys; from epigone.cli import main; code = main(sys.argv[1:]);"
        "print(code, 'jax' in sys.modules, 'lm_eval' in sys.modules)"
    )
    arguments = ["evaluate", "letters", "--teacher", "pieces", "--on", "corpus.txt", "--contexts", "5"]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=Path(folder), capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1].split() == ["0", "False", "False"]
