"""`epigone sample`: scores are of what is shown, and a draft makes texts faster, not other ones."""

import re

import jax
import numpy as np
import pytest
import tiny

from epigone.cli import main
from epigone.data.tokenizers import Tokenizer
from epigone.models.language_model import EOS, Specials
from epigone.opened import open_node
from epigone.verbs import sample

LONGEST = 32
"""max_length of the tiny decoders."""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The run of a tiny lineage, and beside it `other`, whose teacher reads bytes."""
    folder = tmp_path_factory.mktemp("grown")
    config = tiny.write_config(folder)
    for node in ("trigram@0", "teacher@0", "student@1"):
        assert main(["run", str(config), "--run", str(folder / "run"), "--node", node]) == 0
    config = tiny.write_config(folder, tiny.CONFIG.replace("Words", "Bytes"))
    assert main(["run", str(config), "--run", str(folder / "other"), "--node", "teacher@0"]) == 0
    return folder / "run"


def shown(capsys, run, node, *arguments):
    """What is printed, and what stands on standard error."""
    capsys.readouterr()
    assert main(["sample", node, "--run", str(run), *arguments]) == 0
    return capsys.readouterr()


def by_hand(model, prompt, tokens, first, limit):
    """Mean of the log-probabilities, one context at a time, from token `first`; of the end if it was not cut."""
    whole = np.concatenate([prompt, tokens]).astype(np.int32)
    targets = [*whole] if len(tokens) == limit else [*whole, EOS]
    values = [model.next_log_probs([whole[:n]])[0][target] for n, target in enumerate(targets)]
    return np.mean(values[first:], dtype=np.float64)


@pytest.mark.parametrize("node", ["teacher@0", "trigram@0"])
@pytest.mark.parametrize("length", [4, 40])
def test_scores_are_of_the_prompt_the_text_and_an_end_that_was_written(node, length, run, capsys):
    out = shown(capsys, run, node, "--n", "6", "--prompt", "The cat", "--max-length", str(length), "--scores").out
    opened = open_node(node, run)
    prompt = opened.tokenizer.encode("The cat")
    (texts,) = opened.model.sample([prompt], 0, samples=6, length=length)
    limit = length if node == "trigram@0" else min(length, LONGEST - len(prompt))
    wanted = [by_hand(opened.model, prompt, tokens, 0, limit) for tokens in texts]
    np.testing.assert_allclose([float(line.split()[0]) for line in out.splitlines()], wanted, atol=6e-4)
    if length == 4:
        assert any(len(tokens) == limit for tokens in texts)
    elif node == "trigram@0":
        assert any(len(tokens) < limit for tokens in texts)


def test_an_answer_is_scored_after_the_prompt_that_is_not_shown(run, capsys, monkeypatch):
    monkeypatch.setattr(Tokenizer, "render_chat", lambda self, messages: f"The old {messages[0]['content']} sees")
    out = shown(capsys, run, "trigram@0", "--n", "5", "--prompt", "cat", "--chat", "--scores").out
    opened = open_node("trigram@0", run)
    prompt = opened.tokenizer.encode("The old cat sees")
    (texts,) = opened.model.sample([prompt], 0, samples=5, length=128)
    wanted = [by_hand(opened.model, prompt, tokens, len(prompt), 128) for tokens in texts]
    np.testing.assert_allclose([float(line.split()[0]) for line in out.splitlines()], wanted, atol=6e-4)
    alone = [by_hand(opened.model, prompt[:0], tokens, 0, 128) for tokens in texts]
    assert not np.allclose(wanted, alone, atol=0.01)
    assert "sees" not in out.splitlines()[0].split()[1]


def test_an_end_is_any_id_that_ends_a_text():
    class Model:
        specials = Specials(stops=(4,))

        def next_log_probs(self, contexts):
            return np.log([[0.1, 0.1, 0.2, 0.1, 0.3, 0.2]])

    scores = np.log(np.float32([0.5, 0.2]))
    assert sample._end(Model(), np.zeros(1, np.int32), scores) == pytest.approx(np.log(0.5))
    Model.specials = Specials()
    assert sample._end(Model(), np.zeros(1, np.int32), scores) == pytest.approx(np.log(0.2))


def test_texts_are_shown_in_their_order_and_the_same_with_scores(run, capsys):
    prompts = ("--prompt", "The cat", "--prompt", "The old dog", "--n", "3")
    plain = shown(capsys, run, "teacher@0", *prompts).out.splitlines()
    scored = shown(capsys, run, "teacher@0", *prompts, "--scores").out.splitlines()
    assert [line.split(maxsplit=1)[1] for line in scored] == plain
    assert [line.startswith("the cat") for line in plain] == [True] * 3 + [False] * 3
    assert all(line.startswith("the old dog") for line in plain[3:])


def test_a_draft_changes_no_greedy_text(run, capsys):
    prompts = ("--prompt", "The cat", "--prompt", "The", "--n", "2", "--temperature", "0")
    alone = shown(capsys, run, "teacher@0", *prompts)
    drafted = shown(capsys, run, "teacher@0", *prompts, "--draft", "student@1")
    assert drafted.out == alone.out
    last = drafted.err.splitlines()[-1]
    found = re.fullmatch(
        r"draft student@1: (\d+) of (\d+) proposals accepted \((\d+)%\), (\d+\.\d\d) tokens a pass", last
    )
    assert found, last
    assert int(found[1]) <= int(found[2])
    assert 1 <= float(found[4]) <= 5
    assert "draft" not in alone.err


@pytest.mark.parametrize("draft", [(), ("--draft", "student@1")], ids=["plain", "drafted"])
def test_a_mesh_changes_no_text(draft, run, capsys):
    asked = ("teacher@0", "--n", "3", "--prompt", "The cat", *draft)
    mesh = ("--hardware.data", "2", "--hardware.tensor", "2")
    assert shown(capsys, run, *asked, *mesh).out == shown(capsys, run, *asked).out


@pytest.mark.parametrize("node", ["teacher@0", "trigram@0"])
def test_without_warmth_equals_are_told_apart_by_their_ids(node, run):
    model = open_node(node, run).model
    if node == "teacher@0":
        model.params = jax.tree.map(np.zeros_like, model.params)
    texts = [model.sample([np.zeros(0, np.int32)], seed, length=5, temperature=0.0) for seed in (1, 2)]
    np.testing.assert_equal(*texts)


@pytest.mark.parametrize("draft", [(), ("--draft", "student@1")], ids=["plain", "drafted"])
@pytest.mark.parametrize("length", [2**31 - 1, 10**11])
def test_a_text_is_cut_where_the_model_ends_however_long_it_may_be(length, draft, run, capsys):
    asked = ("teacher@0", "--n", "2", "--prompt", "The cat sees", "--seed", "3", *draft)
    assert shown(capsys, run, *asked, "--max-length", str(length)).out == (
        shown(capsys, run, *asked, "--max-length", str(LONGEST)).out
    )


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (["--top-k", str(10**11)], f"top_k is {10**11}"),
        (["--draft", ""], "node ''"),
        (["--hardware.data", "99"], "99 devices"),
    ],
)
def test_bad_numbers_are_one_line(asked, message, run, capsys):
    assert main(["sample", "teacher@0", "--run", str(run), *asked]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert message in said[0]


def test_a_node_drafts_for_itself_and_every_proposal_is_taken(run, capsys):
    drafted = shown(capsys, run, "teacher@0", "--temperature", "0", "--scores", "--draft", f"{run}/teacher@0")
    assert "(100%)" in drafted.err.splitlines()[-1]
    assert drafted.out == shown(capsys, run, "teacher@0", "--temperature", "0", "--scores").out


@pytest.mark.parametrize(
    ("node", "draft", "message"),
    [
        ("teacher@0", "trigram@0", "'trigram@0' counts words"),
        ("trigram@0", "teacher@0", "'trigram@0' counts words"),
        ("teacher@0", "../other/teacher@0", "take a draft with the same tokenizer"),
        ("teacher@0", "studnet@1", "did you mean 'student@1'"),
    ],
)
def test_bad_drafts_are_refused_in_one_line(node, draft, message, run, capsys):
    draft = draft.replace("..", str(run.parent))
    assert main(["sample", node, "--run", str(run), "--draft", draft]) == 2
    said = capsys.readouterr()
    lines = [line for line in said.err.splitlines() if line.startswith("epigone: ")]
    assert len(lines) == 1
    assert message in lines[0]
    assert said.out == ""
