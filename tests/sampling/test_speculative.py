"""What is written with a draft has the target's own distribution, and two naive ways to do it have another one."""

import dataclasses

import jax
import numpy as np
import pytest
import scipy.stats
from decoder_variants import LLAMA, VARIANTS, spread_params

from epigone.errors import UserError
from epigone.models.config import DecoderConfig
from epigone.models.decoder import abstract, init
from epigone.models.language_model import EOS, Specials
from epigone.models.rope import LongRopeScaling
from epigone.models.sharding import Sharding, make_mesh
from epigone.sampling import acceptance, scores, speculative, speculative_loop
from epigone.sampling.decode import DecoderLanguageModel, sample
from epigone.sampling.loop import Knobs, switches
from epigone.sampling.speculative import speculative_sample
from epigone.sampling.speculative_loop import Pair, speculate

SMALL = DecoderConfig(vocab_size=11, layers=2, model_size=16, heads=4, kv_heads=2, max_length=16, vocab_multiple=8)
TARGET = (SMALL, spread_params(SMALL, 1))
DRAFT_CONFIG = dataclasses.replace(SMALL, layers=1, model_size=8, heads=2, kv_heads=1)
DRAFT = (DRAFT_CONFIG, spread_params(DRAFT_CONFIG, 2))
BEGUN = [np.array(p, np.int32) for p in ([5, 9, 3], [])]
LENGTH, COUNT = 3, 4096

PROMPTS = [np.array(p, np.int32) for p in ([5, 9, 3], [], [7, 8, 2, 30, 11, 4], [20])]
OTHER = dataclasses.replace(LLAMA, layers=1, heads=2, kv_heads=1, head_size=6, ff_size=16)
KNOBS = {
    "plain": {},
    "temperature": {"temperature": 0.6},
    "top_k": {"top_k": 3},
    "top_p": {"top_p": 0.8},
    "all": {"temperature": 1.4, "top_k": 6, "top_p": 0.9},
}


def limited(log_probs, temperature=1.0, top_k=0, top_p=1.0):
    """The distribution after temperature, top-k and top-p, by sorting in float64."""
    scaled = log_probs.astype(np.float64) / temperature
    kept = np.ones(len(scaled), bool)
    if top_k:
        kept = scaled >= np.sort(scaled)[-top_k]
    p = np.where(kept, np.exp(scaled), 0) / np.exp(scaled)[kept].sum()
    order = np.argsort(-p)
    enough = int(np.searchsorted(np.cumsum(p[order]), top_p)) + 1
    p[order[enough:]] = 0
    return p / p.sum()


def exact(model, prompt, **knobs):
    """The probability of every text of up to LENGTH tokens, by enumeration with the target alone."""
    reader, finished, open_texts = DecoderLanguageModel(*model), {}, {(): 1.0}
    for _ in range(LENGTH):
        rows = reader.next_log_probs([np.r_[prompt, text].astype(np.int32) for text in open_texts])
        longer = {}
        for (text, so_far), row in zip(open_texts.items(), rows, strict=True):
            for token, p in enumerate(limited(row, **knobs)):
                if p > 0:
                    (finished if token == EOS else longer)[(*text, token)] = so_far * p
        open_texts = longer
    return finished | open_texts


def merged(expected, *counts):
    """Cells of texts; those that are expected fewer than five times are one."""
    common = [text for text, p in expected.items() if p * COUNT >= 5]
    rows = [[c.get(text, 0) for text in common] for c in counts]
    return common, [np.array([*row, COUNT - sum(row)]) for row in rows]


def counted(texts):
    counts: dict[tuple[int, ...], int] = {}
    for text in texts:
        counts[tuple(text.tokens.tolist())] = counts.get(tuple(text.tokens.tolist()), 0) + 1
    return counts


def p_value(texts, expected):
    """Chi-square of what was written against the exact distribution. Impossible texts fail at once."""
    counts = counted(texts)
    if set(counts) - set(expected):
        return 0.0
    common, (seen,) = merged(expected, counts)
    p = np.array([expected[text] for text in common])
    if 1 - p.sum() > 1e-6:
        p = np.r_[p, 1 - p.sum()]
    return scipy.stats.chisquare(seen[: len(p)], p / p.sum() * COUNT).pvalue


def written(**knobs):
    many = {"samples": COUNT, "length": LENGTH, "slots": 2 * COUNT}
    return speculative_sample(TARGET, DRAFT, BEGUN, 0, draft_length=2, **many, **knobs)


@pytest.mark.parametrize("knobs", KNOBS.values(), ids=KNOBS.keys())
def test_texts_have_the_exact_distribution(knobs):
    texts, report = written(**knobs)
    for prompt, found in zip(BEGUN, texts, strict=True):
        expected = exact(TARGET, prompt, **knobs)
        assert sum(expected.values()) == pytest.approx(1, abs=1e-6)
        assert p_value(found, expected) > 0.01
    assert 0.1 < report.judged_rate < 0.9


def test_texts_are_those_of_plain_sampling():
    plain = sample(*TARGET, BEGUN, 1, samples=COUNT, length=LENGTH, slots=2 * COUNT)
    for prompt, found, usual in zip(BEGUN, written()[0], plain, strict=True):
        _, table = merged(exact(TARGET, prompt), counted(found), counted(usual))
        assert scipy.stats.chi2_contingency(table).pvalue > 0.01
        assert counted(found) != counted(usual)


@pytest.fixture
def naive(monkeypatch):
    """Put a wrong function in the place of one of `acceptance`; nothing compiled with it stays."""

    def replace(name, function):
        monkeypatch.setattr(acceptance, name, function)
        speculative_loop.speculate.clear_cache()

    yield replace
    speculative_loop.speculate.clear_cache()


WRONG = {
    "all_kept": ("is_kept", lambda uniform, p, q: p > 0),
    "drawn_from_p": ("residual", lambda p_BV, q_BV: p_BV),
}


@pytest.mark.parametrize(
    ("wrong", "knobs"), [("all_kept", "plain"), ("drawn_from_p", "plain"), ("drawn_from_p", "all")]
)
def test_naive_ways_are_found_out(naive, wrong, knobs):
    wrong, knobs = WRONG[wrong], KNOBS[knobs]
    naive(*wrong)
    for prompt, found in zip(BEGUN, written(**knobs)[0], strict=True):
        assert p_value(found, exact(TARGET, prompt, **knobs)) < 1e-6


def test_acceptance_is_what_the_two_distributions_share():
    knobs = KNOBS["all"]
    _, report = speculative_sample(
        TARGET, DRAFT, BEGUN[:1], 0, draft_length=2, samples=COUNT, length=1, slots=COUNT, **knobs
    )
    p, q = (limited(DecoderLanguageModel(*m).next_log_probs(BEGUN[:1])[0], **knobs) for m in (TARGET, DRAFT))
    assert (report.proposed, report.judged, report.row_passes, report.passes) == (COUNT, COUNT, COUNT, 1)
    assert report.rows_per_pass == COUNT
    assert scipy.stats.binomtest(report.accepted, COUNT, np.minimum(p, q).sum()).pvalue > 0.01


def test_verdict_on_many_rows_at_once():
    rng = np.random.default_rng(0)
    p, q = rng.dirichlet(np.ones(7), 2).astype(np.float32), rng.dirichlet(np.ones(7), 1).astype(np.float32)
    B = 20_000
    proposed_BC = rng.choice(7, (B, 1), p=q[0] / q[0].sum()).astype(np.int32)
    uniform_BT5 = rng.random((B, 2, 5), np.float32)
    p_BTV, q_BCV = (np.broadcast_to(x, (B, *x.shape)) for x in (p, q))
    kept_B, own_B = jax.jit(acceptance.verdict)(p_BTV, q_BCV, proposed_BC, uniform_BT5)
    first_B = np.where(np.asarray(kept_B) == 1, proposed_BC[:, 0], np.asarray(own_B))
    seen = np.bincount(first_B, minlength=7)
    p = p.astype(np.float64)
    assert scipy.stats.chisquare(seen, p[0] / p[0].sum() * B).pvalue > 0.01
    bonus = np.bincount(np.asarray(own_B)[np.asarray(kept_B) == 1], minlength=7)
    assert scipy.stats.chisquare(bonus, p[1] / p[1].sum() * bonus.sum()).pvalue > 0.01
    assert (np.asarray(own_B)[np.asarray(kept_B) == 0] != proposed_BC[np.asarray(kept_B) == 0, 0]).all()


def spread(config, seed=0):
    return config, spread_params(config, seed)


def assert_same(texts, others):
    for row, other_row in zip(texts, others, strict=True):
        for one, other in zip(row, other_row, strict=True):
            np.testing.assert_array_equal(one.tokens, other.tokens)


@pytest.mark.parametrize("name", ["gpt2", "gemma3", "phi3"])
def test_a_model_accepts_its_own_proposals_and_scores_them_as_usual(name):
    model = spread(VARIANTS[name])
    texts, report = speculative_sample(model, model, PROMPTS, 0, samples=2, length=12, draft_length=3)
    assert report.acceptance_rate == report.judged_rate == 1
    assert report.tokens_per_pass > 2
    for prompt, found in zip(PROMPTS, texts, strict=True):
        for text in found:
            body = text.tokens[: len(text.tokens) - (text.tokens[-1] == model[0].specials.eos)]
            whole = DecoderLanguageModel(*model).log_probs([np.r_[prompt, body].astype(np.int32)])[0]
            np.testing.assert_allclose(text.log_probs, whole[len(prompt) :][: len(text.tokens)], atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3_moe"])
def test_greedy_text_is_the_targets_own(name):
    target = spread(VARIANTS[name])
    draft = spread(dataclasses.replace(OTHER, specials=target[0].specials))
    usual = sample(*target, PROMPTS, 0, length=12, temperature=0.0, slots=4)
    texts, report = speculative_sample(target, draft, PROMPTS, 5, length=12, temperature=0.0, draft_length=3)
    assert_same(texts, usual)
    assert report.tokens == sum(len(one.tokens) for (one,) in texts)
    assert report.accepted <= report.judged <= report.proposed <= 3 * report.row_passes
    assert report.tokens <= report.accepted + report.row_passes


def test_one_proposal_a_pass_and_long_rotary_positions():
    original = LongRopeScaling((1.0, 1.5), (4.0, 8.0), 7, 2.0)
    target = spread(dataclasses.replace(LLAMA, rope_scaling=original))
    usual = sample(*target, PROMPTS, 0, length=12, temperature=0.0, slots=4)
    texts, report = speculative_sample(target, spread(OTHER), PROMPTS, 0, length=12, temperature=0.0, draft_length=1)
    assert_same(texts, usual)
    assert 1 <= report.tokens_per_pass <= 2


def test_samples_do_not_depend_on_their_company():
    target, draft = spread(LLAMA), spread(OTHER)
    together, _ = speculative_sample(target, draft, PROMPTS, 0, samples=3, length=6, slots=4, draft_length=3)
    alone, _ = speculative_sample(target, draft, PROMPTS[:3], 0, samples=2, length=6, slots=8, draft_length=3)
    assert_same(alone, [row[:2] for row in together[:3]])
    assert len({tuple(text.tokens) for row in together for text in row}) > 8
    other, _ = speculative_sample(target, draft, PROMPTS, 1, samples=3, length=6, slots=4, draft_length=3)
    assert counted(other[0]) != counted(together[0])


def test_texts_end_at_every_kind_of_end_and_nothing_follows():
    specials = Specials(stops=(7, 9))
    target, draft = (spread(dataclasses.replace(c, specials=specials), 3) for c in (LLAMA, OTHER))
    texts, _ = speculative_sample(target, draft, PROMPTS, 0, samples=40, length=12, slots=64, draft_length=3)
    last = []
    for prompt, row in zip(PROMPTS, texts, strict=True):
        for text in row:
            ends = np.isin(text.tokens, [EOS, 7, 9])
            assert not ends[:-1].any()
            assert len(text.tokens) == len(text.log_probs) >= 1
            assert ends[-1] or len(text.tokens) == min(12, LLAMA.max_length - len(prompt))
            last.append(int(text.tokens[-1]) if ends[-1] else -1)
    assert set(last) == {EOS, 7, 9, -1}


def test_same_text_on_a_mesh():
    narrow = dataclasses.replace(OTHER, kv_heads=2)
    configs = LLAMA, narrow
    wanted = {"samples": 2, "length": 6, "draft_length": 3, "top_k": 20}
    alone = speculative_sample(*((c, init(c, i)) for i, c in enumerate(configs)), PROMPTS, 0, **wanted)
    with jax.set_mesh(make_mesh(2, 2, 2)):
        cut = speculative_sample(*((c, init(c, i)) for i, c in enumerate(configs)), PROMPTS, 0, **wanted)
    assert_same(cut[0], alone[0])
    assert cut[1] == alone[1]
    assert alone[1].accepted > 5


def test_no_array_is_larger_than_the_logits_of_one_pass():
    config = dataclasses.replace(LLAMA, vocab_size=2000)
    draft = dataclasses.replace(OTHER, vocab_size=2000)
    pair = Pair(config, draft, Sharding(), switches(Knobs(1.0, 5, 0.9)), 4, 32)
    params = (abstract(c) for c in (config, draft))
    B_ = np.zeros(16, np.int32)
    rows = (np.zeros((16, 16), np.int32), *[B_] * 4)
    traced = jax.make_jaxpr(lambda *a: speculate(pair, *a))(*params, *rows, jax.random.key(0), Knobs(1.0, 5, 0.9))
    assert max(sizes(traced.jaxpr)) == 16 * 5 * 2000


def test_no_more_slots_are_used_than_have_room_for_their_logits(monkeypatch):
    models = (LLAMA, init(LLAMA, 0)), (OTHER, init(OTHER, 1))
    wanted = {"samples": 2, "length": 4, "draft_length": 3}
    whole, _ = speculative_sample(*models, PROMPTS, 0, **wanted)
    rows = []

    def counted(pair, *arrays):
        rows.append(len(arrays[2]))
        return speculate(pair, *arrays)

    monkeypatch.setattr(speculative, "speculate", counted)
    monkeypatch.setattr(scores, "LOGITS", 3 * 4 * LLAMA.sizes.V)
    assert_same(speculative_sample(*models, PROMPTS, 0, **wanted)[0], whole)
    assert rows == [2] * len(PROMPTS)
    monkeypatch.setattr(scores, "LOGITS", 1)
    assert_same(speculative_sample(*models, PROMPTS, 0, **wanted)[0], whole)
    assert rows[len(PROMPTS) :] == [1] * 2 * len(PROMPTS)


def sizes(jaxpr):
    """Numbers in every array of a program, those of its loops included."""
    found = [v.aval.size for equation in jaxpr.eqns for v in equation.outvars if hasattr(v.aval, "size")]
    for equation in jaxpr.eqns:
        for inner in jax.core.jaxprs_in_params(equation.params):
            found += sizes(inner)
    return found


def test_bad_requests_are_refused():
    target, draft = (LLAMA, None), (OTHER, None)

    def refused(words, target=target, draft=draft, prompts=PROMPTS, **knobs):
        with pytest.raises(UserError, match=words):
            speculative_sample(target, draft, prompts, 0, **knobs)

    refused("target 37 != of the draft 40", draft=(dataclasses.replace(OTHER, vocab_size=40), None))
    refused("Specials.*never=\\(\\).*both need", draft=(dataclasses.replace(OTHER, specials=Specials(never=())), None))
    refused("draft_length is 0", draft_length=0)
    refused("length is 0", length=0)
    refused("a prompt has 16 tokens", prompts=[np.full(16, 5, np.int32)])
    refused(
        "up to 12 tokens, and the draft's max_length is 8",
        draft=(dataclasses.replace(OTHER, max_length=8), None),
        length=6,
    )
    refused("temperature is -1", temperature=-1.0)
    empty, report = speculative_sample((LLAMA, None), (OTHER, None), [], 0)
    assert empty == []
    assert (report.acceptance_rate, report.judged_rate, report.tokens_per_pass) == (0, 0, 0)
