"""Beam search against every continuation there is, and what it does where it cannot see them all."""

import itertools

import numpy as np
import pytest

from epigone.errors import UserError
from epigone.models.beam import Beams, Next, most_probable, search
from epigone.models.language_model import EOS
from epigone.models.ngram import NGram, NGramModel

V = 7


@pytest.fixture(scope="module")
def model():
    draw = np.random.default_rng(0)
    texts = [(3 + np.cumsum(draw.integers(1, 3, 5)) % 4).astype(np.int32) for _ in range(60)]
    return NGramModel.fit(NGram(order=3), texts, V)


def every_continuation(model, prompt, length):
    """(score, tokens): all that end within `length` tokens, and all that are cut there."""
    for n in range(1, length + 1):
        for body in itertools.product(range(3, V), repeat=n - 1):
            ended = [*body, EOS]
            yield score(model, prompt, ended), list(body)
    for body in itertools.product(range(3, V), repeat=length):
        yield score(model, prompt, list(body)), list(body)


def score(model, prompt, tokens):
    rows = model.next_log_probs([np.array([*prompt, *tokens[:t]], np.int32) for t in range(len(tokens))])
    return sum(rows[t, token] for t, token in enumerate(tokens)) / len(tokens)


@pytest.mark.parametrize("prompt", [[], [4], [3, 5], [6, 6]])
def test_with_room_for_all_it_finds_the_best_of_all(model, prompt):
    length = 3
    found = model.beam([np.array(prompt, np.int32)], beams=V**length, length=length)[0]
    ended, cut = [], []
    for value, tokens in every_continuation(model, prompt, length):
        (cut if len(tokens) == length else ended).append((value, tokens))
    best = max(ended, key=lambda one: one[0])
    assert found.tolist() in (best[1], max(cut, key=lambda one: one[0])[1])
    assert found.tolist() == max([*ended, *cut], key=lambda one: one[0])[1] or found.tolist() == best[1]


def test_one_beam_is_greedy_until_the_end(model):
    prompts = [np.array(p, np.int32) for p in ([], [4], [3, 5])]
    greedy = [row[0] for row in model.sample(prompts, 0, length=6, temperature=0)]
    for one, other in zip(model.beam(prompts, beams=1, length=6), greedy, strict=True):
        np.testing.assert_array_equal(one, other)


def test_more_beams_find_what_is_more_probable(model):
    prompts = [np.array([a, b], np.int32) for a in range(3, V) for b in range(3, V)]

    def mean(found):
        ended = [[*tokens, *([EOS] if len(tokens) < 8 else [])] for tokens in found]
        return np.mean([score(model, list(prompt), tokens) for prompt, tokens in zip(prompts, ended, strict=True)])

    drawn = mean([row[0] for row in model.sample(prompts, 0, length=8)])
    one, four, eight = (mean(model.beam(prompts, beams=beams, length=8)) for beams in (1, 4, 8))
    assert drawn + 0.1 < one < four <= eight


def test_a_beam_that_is_better_than_what_ended_goes_on():
    """Ending now scores -1; three sure tokens and an end after a first step of -1.2 score -0.3."""
    low = -50.0
    rows = {0: {EOS: -1.0, 3: -1.2}, 1: {4: 0.0}, 2: {5: 0.0}, 3: {EOS: 0.0}}
    state = {"at": 0}

    def step(parents, tokens):
        state["at"] += 1
        return table(state["at"])

    def table(at):
        row = np.full((2, V), low)
        for token, value in rows[at].items():
            row[:, token] = value
        return most_probable(row, 4)

    assert search(step, table(0), Beams(1, 2, 10, (EOS,)))[0].tolist() == [3, 4, 5]


def test_prompts_do_not_disturb_each_other(model):
    prompts = [np.array(p, np.int32) for p in ([], [4], [3, 5], [6])]
    together = model.beam(prompts, beams=3, length=6)
    for prompt, found in zip(prompts, together, strict=True):
        np.testing.assert_array_equal(model.beam([prompt], beams=3, length=6)[0], found)


def test_ties_go_to_the_lower_id_and_no_beam_is_refused():
    assert most_probable(np.array([[0.0, 1.0, 1.0]]), 2).tokens_RM.tolist() == [[1, 2]]
    with pytest.raises(UserError, match="beams=0"):
        Beams(1, 0, 3, (EOS,))
    impossible = Next(np.array([[3, 4]]), np.full((1, 2), -np.inf))
    assert search(lambda *_: impossible, impossible, Beams(1, 1, 5, (EOS,)))[0].tolist() == []
