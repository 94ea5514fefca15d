"""What is asked: every strategy gives the same prompts in the same order, none of them twice."""

import json

import numpy as np
import pytest
import tiny

from epigone.arena.prompts import Answered, First, Framed, Grouped, Hardest, Lines, Mixed, Prefixes
from epigone.cli import main
from epigone.data.corpora import TextFiles
from epigone.data.datasets import write_text
from epigone.errors import UserError
from epigone.opened import open_node


def these(*prompts):
    return lambda data_dir: iter(prompts)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prompts")
    tiny.write_corpus(folder)
    return folder


def test_prefixes_are_of_whole_documents_in_a_shuffled_order(folder):
    corpus = TextFiles(str(folder / "corpus.txt"))
    prompts = list(Prefixes(corpus, words=5)(folder))
    texts = list(corpus.prepare(folder)["train"])
    wanted = {" ".join(text.split()[:5]) for text in texts if len(text.split()) > 5}
    assert len(prompts) == len(wanted)
    assert set(prompts) == wanted
    assert prompts == list(Prefixes(corpus, words=5)(folder))
    other = list(Prefixes(corpus, words=5, seed=1)(folder))
    assert other != prompts
    assert set(other) == wanted
    assert not list(Prefixes(corpus, words=100)(folder))


def test_lines_are_those_of_files(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("one", "two", "one")))
    (tmp_path / "b.txt").write_text("three\n\nfour")
    assert list(Lines(str(tmp_path / "a.jsonl"))(tmp_path)) == ["one", "two"]
    assert list(Lines(str(tmp_path / "b.txt"))(tmp_path)) == ["three", "four"]


def test_frames_come_in_turn(tmp_path):
    framed = Framed(these("a", "b", "c"), ("Say {} again.", "{}?"))
    assert list(framed(tmp_path)) == ["Say a again.", "b?", "Say c again."]
    with pytest.raises(UserError, match="once"):
        Framed(these(), ("no place",))


def test_a_mixture_keeps_its_shares_at_every_moment_and_asks_nothing_twice(tmp_path):
    parts = [these(*(f"{name}{n}" for n in range(600))) for name in "abc"]
    found = list(Mixed(tuple(parts), (1.0, 2.0, 5.0))(tmp_path))
    for n in range(1, len(found) + 1):
        for name, share in zip("abc", (1 / 8, 2 / 8, 5 / 8), strict=True):
            assert abs(sum(prompt[0] == name for prompt in found[:n]) - share * n) < 1.5
    assert sum(prompt[0] == "c" for prompt in found) == 600
    assert list(Mixed((these("x", "y"), these("y", "x", "z")), (1.0, 1.0))(tmp_path)) == ["x", "y"]
    with pytest.raises(UserError, match="weights"):
        Mixed((these(),), (1.0, 2.0))


def test_groups_and_the_first_of_many(tmp_path):
    assert list(Grouped(these(*"abcdefg"), 3, "Go on:\n")(tmp_path)) == ["Go on:\na\nb\nc\n", "Go on:\nd\ne\nf\n"]
    assert list(First(these(*"abc"), 2)(tmp_path)) == ["a", "b"]


def test_answers_become_prompts_unless_they_are_like_another(tmp_path):
    answers = [
        "  Name the king of the land.\nAnd more",
        "Name the king of the sea",
        "short one",
        "What is a cat good for",
    ]
    write_text(tmp_path / "mine" / "answers", [*answers, answers[0], ""], {"name": "mine"})
    found = list(Answered(str(tmp_path / "mine"), overlap=0.7)(tmp_path))
    assert found == [
        "Name the king of the land.",
        "What is a cat good for",
    ]  # four of five pairs are those of the first
    assert list(Answered(str(tmp_path / "mine"), overlap=1.0)(tmp_path)) == [*found[:1], answers[1], *found[1:]]
    assert list(Answered(str(tmp_path / "mine"), words=2)(tmp_path)) == [*found[:1], "short one", *found[1:]]


def test_the_hardest_are_those_after_which_a_student_is_least_sure(folder):
    config = tiny.write_config(folder)
    assert main(["run", str(config), "--run", str(folder / "run"), "--node", "trigram@0"]) == 0
    prompts = sorted({" ".join(text.split()[:n]) for text in tiny.sentences(40) for n in (2, 3, 4)})
    opened = open_node("trigram@0", folder / "run")
    unsure = {}
    for prompt in prompts:
        p = np.exp(opened.model.next_log_probs([opened.tokenizer.encode(prompt)])[0].astype(np.float64))
        unsure[prompt] = -sum(x * np.log(x) for x in p if x > 0)
    wanted = sorted(prompts, key=lambda prompt: -unsure[prompt])
    found = list(Hardest(these(*prompts), f"{folder / 'run'}/trigram@0", share=0.25)(folder))
    assert len(found) == round(0.25 * len(prompts))
    assert [unsure[prompt] for prompt in found] == pytest.approx([unsure[prompt] for prompt in wanted[: len(found)]])
    blocks = list(Hardest(these(*prompts), f"{folder / 'run'}/trigram@0", share=0.5, look_at=10)(folder))
    assert set(blocks[:5]) <= set(prompts[:10])
    with pytest.raises(UserError, match="share"):
        Hardest(these(), "x", share=0.0)
