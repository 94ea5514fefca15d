"""lm-evaluation-harness on tiny models: its figures are those that follow from the models' own probabilities."""

import json
import re
from functools import partial
from types import SimpleNamespace

import datasets
import jax
import lm_eval
import numpy as np
import pytest
import yaml
from lm_eval.tasks import TaskManager
from tiny import sentences

from epigone.data.tokenizers import BPE, Words
from epigone.errors import UserError
from epigone.evaluate.continuations import Piece, pieces_of, scores_by_asking
from epigone.evaluate.harness import HarnessModel, answer_of
from epigone.models.config import DecoderConfig
from epigone.models.decoder import apply, init
from epigone.models.language_model import BOS
from epigone.models.ngram import NGram, NGramModel
from epigone.sampling.decode import DecoderLanguageModel
from epigone.sampling.greedy import continuation_scores

TEXTS = sentences(300)
forward = jax.jit(apply, static_argnums=0)


@pytest.fixture(scope="module")
def words():
    return Words().build(TEXTS)


@pytest.fixture(scope="module")
def trigram(words):
    return NGramModel.fit(NGram(), words.encode_batch(TEXTS), words.size)


@pytest.fixture(scope="module")
def decoder(words):
    config = DecoderConfig(vocab_size=words.size, layers=1, model_size=16, heads=2, max_length=16)
    params = jax.tree.map(lambda x: 4 * x, init(config, 0))  # probabilities that differ
    return DecoderLanguageModel(config, params)


@pytest.fixture(scope="module")
def models(words, trigram, decoder):
    config = decoder.config
    score = partial(continuation_scores, config, decoder.sharding, decoder.params)
    return {
        "trigram": HarnessModel(trigram, words),
        "decoder": HarnessModel(decoder, words, score=score, max_length=config.max_length),
    }


both = pytest.mark.parametrize("name", ["trigram", "decoder"])


def asked(*arguments):
    return [SimpleNamespace(args=one) for one in arguments]


def all_next(model, ids):
    """Log-probabilities [n, V] of the token after each prefix of bos + ids, one by one."""
    return np.concatenate([model.next_log_probs([ids[:n]]) for n in range(len(ids))]).astype(np.float64)


def by_hand(model, tokenizer, context, continuation):
    ids = tokenizer.encode(context + continuation)
    first = len(tokenizer.encode(context.rstrip()))
    rows = all_next(model, ids)[first:]
    return rows[np.arange(len(rows)), ids[first:]].sum(), bool((rows.argmax(1) == ids[first:]).all())


PAIRS = [
    ("The old cat", " sees the king"),
    ("The old cat ", "sees"),
    ("", "The small dog"),
    ("The old dog sees the", " bird at night."),
    ("The", " loud"),
    ("The old cat sees the king by the", " river"),
]


@both
def test_continuations_have_their_log_probability_and_know_whether_they_are_greedy(name, models, words):
    lm = models[name]
    greedy = []
    for pair, (log_prob, is_greedy) in zip(PAIRS, lm.loglikelihood(asked(*PAIRS)), strict=True):
        wanted, wanted_greedy = by_hand(lm.model, words, *pair)
        np.testing.assert_allclose(log_prob, wanted, rtol=1e-5)
        assert is_greedy == wanted_greedy
        greedy.append(is_greedy)
    best = [lm.model.next_log_probs([words.encode(context)])[0].argmax() for context, _ in PAIRS]
    written = asked(*((c, " " + words.decode([t])) for (c, _), t in zip(PAIRS, best, strict=True) if t > 3))
    assert all(is_greedy for _, is_greedy in lm.loglikelihood(written))
    assert len(written) > 3
    assert not all(greedy)


def test_spaces_at_the_end_of_a_context_belong_to_the_continuation():
    tokenizer = BPE(vocab_size=320).build(TEXTS)
    model = NGramModel.fit(NGram(), tokenizer.encode_batch(TEXTS), tokenizer.size)
    lm = HarnessModel(model, tokenizer)
    (spaced, plain) = lm.loglikelihood(asked(("The old ", "cat"), ("The old", " cat")))
    assert spaced == plain
    rows = all_next(model, tokenizer.encode("The old cat"))
    ids, first = tokenizer.encode("The old cat"), len(tokenizer.encode("The old"))
    np.testing.assert_allclose(plain[0], rows[np.arange(len(ids)), ids][first:].sum(), rtol=1e-9)


@pytest.mark.parametrize(("context", "continuation"), [("The old cat", ""), ("The old cat", "  "), ("", " ")])
def test_a_continuation_without_a_token_is_refused_by_name(context, continuation, models):
    """Scored, it would be a certain answer: log-probability 0."""
    with pytest.raises(UserError, match=f"continuation '{continuation}' adds no token") as error:
        models["trigram"].loglikelihood(asked(("The old", " cat"), (context, continuation)))
    assert "\n" not in str(error.value)


def test_a_continuation_that_merges_into_the_context_is_refused():
    class Joins:
        """Two letters are one token, and a last one alone is one."""

        identity = "joins"

        def encode(self, text):
            return np.array([3 + ord(text[n]) % 8 for n in range(0, len(text), 2)], np.int32)

        def decode(self, ids):
            return "".join(chr(97 + index) for index in ids)

    model = NGramModel.fit(NGram(), [Joins().encode("abcabdacbd")], 12)
    with pytest.raises(UserError, match="continuation 'b' adds no token"):
        HarnessModel(model, Joins()).loglikelihood(asked(("cda", "b")))
    assert len(HarnessModel(model, Joins()).loglikelihood(asked(("cd", "ab")))) == 1


def test_asking_token_by_token_equals_one_pass(decoder, words):
    """Two ways to the same scores, greedy ones among them."""
    ids = [np.r_[BOS, words.encode(text)].astype(np.int32)[:12] for text in TEXTS[:12]]
    pieces = [Piece(i[:-1], i[-3:]) for i in ids]
    for n in range(4):  # what greedy decoding writes itself
        prompt = ids[n][1:5]
        answer = decoder.sample([prompt], 0, length=3, top_k=1)[0][0]
        if len(answer):
            whole = np.r_[BOS, prompt, answer].astype(np.int32)
            pieces.append(Piece(whole[:-1], whole[-len(answer) :]))
    quick = continuation_scores(decoder.config, decoder.sharding, decoder.params, pieces)
    slow = scores_by_asking(decoder, pieces)
    np.testing.assert_allclose([s.log_prob for s in slow], [q[0] for q in quick], rtol=1e-5)
    assert [s.greedy for s in slow] == [q[1] for q in quick]
    assert {s.greedy for s in slow} == {True, False}


def test_pieces_are_the_windows_of_the_harness():
    ids = np.arange(100, 123)  # 100 stands for bos
    from lm_eval.utils import get_rolling_token_windows

    for longest in (4, 5, 22, 23, 40):
        theirs = list(get_rolling_token_windows(list(ids[1:]), 100, longest, 1))
        ours = [(list(p.inputs_T), list(p.targets_C)) for p in pieces_of(ids, len(ids) - 1, longest)]
        assert ours == theirs
    (piece,) = pieces_of(ids, 3, 6)
    np.testing.assert_array_equal(piece.inputs_T, ids[-7:-1])
    np.testing.assert_array_equal(piece.targets_C, ids[-3:])
    assert pieces_of(ids, 0, 6) == []


def test_long_texts_are_scored_in_windows(models, decoder, words):
    """A text of three windows: each token after at least one, and the last window full."""
    text = " ".join(TEXTS[:5])
    ids = np.r_[BOS, words.encode(text)].astype(np.int32)
    longest, total = decoder.config.max_length, 0.0
    assert 2 * longest < len(ids) - 1
    for start in range(1, len(ids), longest):
        end = min(start + longest, len(ids))
        inputs = ids[max(0, end - 1 - longest) : end - 1]
        row = np.zeros((3, 1, longest), np.int32)
        row[:, 0, : len(inputs)] = inputs, np.arange(len(inputs)), np.ones(len(inputs))
        scores = np.asarray(jax.nn.log_softmax(forward(decoder.config, decoder.params, *row)))[0, : len(inputs)]
        total += scores[-(end - start) :][np.arange(end - start), ids[start:end]].sum()
    (found,) = models["decoder"].loglikelihood_rolling(asked((text,)))
    np.testing.assert_allclose(found, total, rtol=1e-5)


@both
def test_answers_end_at_a_stop_string_and_are_greedy(name, models, words):
    lm = models[name]
    prompt = "The old cat"
    whole = lm.model.sample([words.encode(prompt)], 0, length=6, top_k=1)[0][0]
    stop = words.decode(whole[3:4])
    wanted = words.decode(whole)
    answers = lm.generate_until(
        asked((prompt, {"max_gen_toks": 6}), (prompt, {"max_gen_toks": 6, "until": [stop]}), ("", {"until": "."}))
    )
    assert answers[0] == wanted
    assert answers[1] == wanted.split(stop)[0] != wanted
    assert "." not in answers[2]


def test_a_long_context_is_cut_at_its_beginning(models, decoder, words):
    text = " ".join(TEXTS[:5])
    room = decoder.config.max_length - 1 - 4
    wanted = decoder.sample([words.encode(text)[-room:]], 0, length=4, top_k=1)[0][0]
    assert models["decoder"].generate_until(asked((text, {"max_gen_toks": 4}))) == [words.decode(wanted)]


def test_sampled_answers_differ_and_repeat(models):
    request = ("The old cat", {"do_sample": True, "temperature": 1.0, "max_gen_toks": 8})
    first, again = (models["trigram"].generate_until(asked(*[request] * 6)) for _ in range(2))
    assert first == again
    assert len(set(first)) > 2


class Talker:
    """A tokenizer with a chat template that spells bos out, and one special token beside it."""

    chat_template = "a template"
    identity = "talker"
    special = ("<s>", "<turn>")

    def encode(self, text, specials=False):
        pieces = re.split(r"(<s>|<turn>)", text) if specials else [text]
        spelled = [[1 + self.special.index(p)] if p in self.special else [4 + ord(c) % 30 for c in p] for p in pieces]
        return np.array([i for one in spelled for i in one], np.int32)

    def render_chat(self, messages, add_generation_prompt=True):
        return "<s>" + "".join(f"<turn>{m['content']}" for m in messages) + "<turn>" * add_generation_prompt


def test_a_chat_is_read_with_its_special_tokens_and_one_bos(trigram):
    lm = HarnessModel(trigram, Talker(), chat=True)
    prompt = lm.apply_chat_template([{"role": "user", "content": "ab"}])
    assert (prompt, lm.chat_template(True), lm.tokenizer_name) == ("<s><turn>ab<turn>", "a template", "talker")
    asked_for = []
    lm.score = lambda pieces: [asked_for.append(piece) or (0.0, True) for piece in pieces]
    lm.loglikelihood(asked((prompt, "c")))
    a, b, c = Talker().encode("abc")
    np.testing.assert_array_equal(asked_for[0].inputs_T, [1, 2, a, b, 2])
    np.testing.assert_array_equal(asked_for[0].targets_C, [c])
    mere_text = HarnessModel(trigram, Talker())
    mere_text.score = lm.score
    mere_text.loglikelihood(asked((prompt, "c")))
    assert len(asked_for[1].inputs_T) == 1 + len(prompt)


def test_without_a_chat_template_one_line_says_so(trigram, words):
    with pytest.raises(UserError, match="no chat template"):
        HarnessModel(trigram, words, chat=True).apply_chat_template([{"role": "user", "content": "a"}])


def test_nothing_more_is_written_when_every_answer_has_ended(trigram, words):
    class Slow:
        """Writes one word at a time and counts them."""

        specials, drawn = trigram.specials, 0

        def stream(self, prompts, seed, **_):
            for token in words.encode("the old cat sees the king by the river"):
                for index in range(len(prompts)):
                    self.drawn += 1
                    yield index, 0, np.array([token], np.int32)

    slow = Slow()
    lm = HarnessModel(slow, words)
    assert lm.generate_until(asked(*[("", {"until": ["sees"]})] * 3)) == ["the old cat "] * 3
    assert slow.drawn == 3 * 4


def test_how_answers_are_written():
    assert answer_of({}, None) == ((), 256, 0.0, 0, 1.0)
    assert answer_of({"until": ["\n", ""], "temperature": 0.0}, 64) == (("\n",), 32, 0.0, 0, 1.0)
    assert answer_of({"do_sample": False, "temperature": 0.7, "max_new_tokens": 5}, 64)[1:4] == (5, 0.0, 0)
    assert answer_of({"temperature": 0.7, "top_p": 0.9}, None)[2:] == (0.7, 0, 0.9)
    assert answer_of({"do_sample": True}, None)[2:] == (1.0, 0, 1.0)
    for name, value in (("max_gen_toks", "many"), ("until", 5), ("top_k", "x"), ("top_p", "x"), ("temperature", "hot")):
        with pytest.raises(UserError, match=f"{name}=.* is wanted"):
            answer_of({"temperature": 1.0, name: value}, 64)
    for wrong in ({"num_beams": 4}, {"max_gen_toks": 64}, {"max_gen_toks": 0}):
        with pytest.raises(UserError, match=r"num_beams|max_gen_toks"):
            answer_of(wrong, 64)


CHOICES = [
    {"question": "The old cat", "options": [" sees", " king", " night"], "answer": 0},
    {"question": "The small dog sees the", "options": [" river", " bird"], "answer": 1},
    {"question": "The loud king", "options": [" the", " likes the bird", " follows the child"], "answer": 2},
    {"question": "The good", "options": [" child", " by", " old"], "answer": 1},
]
TASKS = {
    "choose": {
        "output_type": "multiple_choice",
        "doc_to_text": "question",
        "doc_to_choice": "options",
        "doc_to_target": "answer",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    },
    "roll": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "text",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    },
    "answer": {
        "output_type": "generate_until",
        "doc_to_text": "question",
        "doc_to_target": "wanted",
        "generation_kwargs": {"until": ["."], "max_gen_toks": 6},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
}


def write_tasks(folder, rows):
    """A task file and its data, as a user has them on disk."""
    paths = []
    for name, task in TASKS.items():
        data = folder / f"{name}.jsonl"
        data.write_text("\n".join(json.dumps(row) for row in rows[name]))
        local = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
        path = folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump({"task": f"{name}_tiny", **local, **task}))
        paths.append(str(path))
    return paths


@both
def test_the_harness_finds_what_the_probabilities_say(name, models, words, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    lm = models[name]
    questions = ["The old cat", "The small dog sees the", "The loud king likes"]
    said = lm.generate_until(asked(*((q, {"until": ["."], "max_gen_toks": 6}) for q in questions)))
    wanted = [said[0], said[1], "something else"]
    rows = {
        "choose": CHOICES,
        "roll": [{"text": text} for text in TEXTS[:7]],
        "answer": [{"question": q, "wanted": w} for q, w in zip(questions, wanted, strict=True)],
    }
    paths = write_tasks(tmp_path, rows)
    manager = TaskManager(include_defaults=False)
    results = lm_eval.simple_evaluate(model=lm, tasks=paths, task_manager=manager, bootstrap_iters=0)["results"]

    scores = [[by_hand(lm.model, words, c["question"], o)[0] for o in c["options"]] for c in CHOICES]
    right = [int(np.argmax(one)) == c["answer"] for one, c in zip(scores, CHOICES, strict=True)]
    assert results["choose_tiny"]["acc,none"] == np.mean(right)

    nats = -sum(by_hand(lm.model, words, "", text)[0] for text in TEXTS[:7])
    count = sum(len(text.split()) for text in TEXTS[:7])
    size = sum(len(text.encode()) for text in TEXTS[:7])
    np.testing.assert_allclose(results["roll_tiny"]["word_perplexity,none"], np.exp(nats / count), rtol=1e-5)
    np.testing.assert_allclose(results["roll_tiny"]["bits_per_byte,none"], nats / np.log(2) / size, rtol=1e-5)

    np.testing.assert_allclose(results["answer_tiny"]["exact_match,none"], 2 / 3)
