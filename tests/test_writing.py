"""Sequence-level distillation: which candidate and which documents are taken, by whose word, and what becomes of it."""

import dataclasses
import json
import shutil
from functools import partial

import jax
import numpy as np
import pytest
import tiny
from tiny import Silent

from epigone.data.corpora import TextFiles
from epigone.data.tokenizers import Bytes, Words
from epigone.errors import Fault, UserError
from epigone.grow import grow
from epigone.identity import fingerprint
from epigone.lessons.objective import TEXT_ALONE
from epigone.lineage import Lesson, Lineage, Node, Text, TrainedTokenizer, Written
from epigone.materials import Materials
from epigone.models.config import DecoderConfig
from epigone.models.decoder import flops_per_token
from epigone.models.ngram import NGram, NGramModel
from epigone.plan import plan
from epigone.sampling.watermark import GreenList, hashes, is_green, seeds
from epigone.store import Store
from epigone.training.config import Training
from epigone.verbs.descriptions import lesson_in_words, real_texts
from epigone.writing import BLOCK, Tally, prompts_of, scores, write_chosen

LONGEST = 12
MODEL = DecoderConfig(layers=1, model_size=8, heads=2, max_length=32)


@pytest.fixture(scope="module")
def models():
    """A writer, and a judge that knows more of the text."""
    draw = np.random.default_rng(0)
    steps = draw.integers(1, 4, (400, 8))
    texts = [(4 + np.cumsum(row) % 12).astype(np.int32) for row in steps]
    return NGramModel.fit(NGram(order=2), texts[:40], 20), NGramModel.fit(NGram(order=3), texts, 20)


def written(models, tokens=300, given=None, judged=True, holds=None, **how):
    source = Written("writer@0", tokens, max_length=LONGEST, **how)
    judge = partial(scores, models[1], prompt_tokens=source.prompt_tokens, longest=LONGEST) if judged else None
    return write_chosen(source, models[0], judge, given, LONGEST, lambda block: 100 + block, holds)


# ------------------------------------------------------------------ scores
def test_a_score_is_the_mean_of_what_was_written_and_not_of_what_was_given(models):
    _, judge = models
    documents = [np.arange(5, 5 + n, dtype=np.int32) for n in (0, 1, 4, LONGEST)]
    for prompt_tokens in (0, 3):
        given = [d for d in documents if len(d) >= prompt_tokens]
        for document, score in zip(given, scores(judge, given, prompt_tokens, LONGEST), strict=True):
            # One row for each token, and one for its end; who is cut at the longest length has none.
            events = [*document, *([2] if len(document) < LONGEST else [])]
            rows = judge.next_log_probs([document[:t] for t in range(len(events))])
            wanted = np.mean([rows[t, event] for t, event in enumerate(events)][prompt_tokens:])
            assert score == pytest.approx(wanted, abs=1e-12)


def test_what_a_judge_rules_out_is_last_and_what_is_no_number_is_a_fault():
    class Given:
        def __init__(self, rows):
            self.rows = rows

        def log_probs(self, documents):
            return self.rows

    document = np.zeros(1, np.int32)
    assert scores(Given([np.array([-np.inf, -1.0])]), [document], 0, 9)[0] == -np.inf
    with pytest.raises(Fault, match="not a number"):
        scores(Given([np.array([np.nan, -1.0])]), [document], 0, 9)
    assert "score_of_kept" not in Tally(1, 1, 1, 1, -np.inf, -np.inf).card()


# ------------------------------------------------------------------ best of n, and the best share
def test_the_best_candidate_of_each_document_is_taken(models):
    """Candidates are drawn alike whatever is asked for: so the choice can be made again by hand."""
    writer, judge = models
    documents, tally = written(models, best_of=3, tokens=2000)
    drawn = writer.sample([np.zeros(0, np.int32)] * BLOCK, 100, samples=3, length=LONGEST)
    for document, row in zip(documents[:BLOCK], drawn, strict=False):
        values = scores(judge, row, 0, LONGEST)
        np.testing.assert_array_equal(document, row[int(np.argmax(values))])
    assert tally.drawn == 3 * tally.documents == 3 * tally.kept


def test_the_best_share_of_each_block_is_kept_in_its_order(models):
    writer, judge = models
    documents, tally = written(models, keep=0.25, tokens=600)
    drawn = [row[0] for row in writer.sample([np.zeros(0, np.int32)] * BLOCK, 100, samples=1, length=LONGEST)]
    values = scores(judge, drawn, 0, LONGEST)
    limit = np.sort(values)[-BLOCK // 4]
    chosen = [d for d, value in zip(drawn, values, strict=True) if value >= limit]
    assert len(chosen) == BLOCK // 4
    for document, wanted in zip(documents, chosen, strict=False):
        np.testing.assert_array_equal(document, wanted)
    assert tally.card()["kept"] == 0.25
    assert tally.card()["score_of_kept"] > tally.card()["score_of_candidates"] + 0.1


@pytest.mark.parametrize("how", [{"best_of": 4}, {"keep": 0.2}, {"best_of": 2, "keep": 0.5}])
def test_the_judge_likes_what_is_chosen_more_than_what_is_drawn(how, models):
    plain = models[0].write(3000, 0, max_length=LONGEST)
    chosen, tally = written(models, tokens=1500, **how)
    assert np.mean(scores(models[1], chosen, 0, LONGEST)) > np.mean(scores(models[1], plain, 0, LONGEST)) + 0.15
    assert sum(len(d) + 1 for d in chosen) >= 1500 > sum(len(d) + 1 for d in chosen[:-1])
    assert tally.tokens > 0.9 * 1500 * how.get("best_of", 1) / how.get("keep", 1)


@pytest.mark.parametrize("how", [{"best_of": 2}, {"keep": 0.4}, {"prompts": Text("c"), "prompt_tokens": 2}])
def test_a_longer_text_begins_as_a_shorter_one(how, models):
    given = [np.arange(4, 9, dtype=np.int32)[:2]] * 3 if "prompts" in how else None
    short, long = (written(models, tokens, given, **how)[0] for tokens in (200, 2000))
    assert len(short) < len(long)
    for one, other in zip(short, long, strict=False):
        np.testing.assert_array_equal(one, other)


def short(document):
    return len(document) < 6


def test_what_breaks_the_rule_is_left_out_and_counted(models):
    documents, tally = written(models, 600, judged=False, holds=short, rule=short)
    drawn = [row[0] for row in models[0].sample([np.zeros(0, np.int32)] * BLOCK, 100, samples=1, length=LONGEST)]
    for document, wanted in zip(documents, filter(short, drawn), strict=False):
        np.testing.assert_array_equal(document, wanted)
    assert all(map(short, documents))
    assert tally.kept + tally.ruled_out == tally.drawn
    assert tally.card()["ruled_out"] == tally.ruled_out / tally.drawn > 0.2


def test_of_what_keeps_the_rule_the_best_are_taken(models):
    documents, tally = written(models, 400, holds=short, rule=short, keep=0.5, best_of=2)
    assert all(map(short, documents))
    assert tally.card()["score_of_kept"] > tally.card()["score_of_candidates"]
    plain = written(models, 400, judged=False, holds=short, rule=short)[0]
    assert np.mean(scores(models[1], documents, 0, LONGEST)) > np.mean(scores(models[1], plain, 0, LONGEST)) + 0.1


def test_a_rule_that_nothing_keeps_ends_in_one_line(models):
    with pytest.raises(UserError, match="not one of 5120 documents keeps the rule 'short'"):
        written(models, judged=False, holds=lambda document: False, rule=short)


# ------------------------------------------------------------------ prompts
def test_every_document_begins_as_a_document_of_the_prompts(models):
    texts = [np.arange(4, 4 + n, dtype=np.int32)[::-1] for n in (2, 3, 4, 6)]
    source = Written("writer@0", 5000, max_length=LONGEST, prompts=Text("c"), prompt_tokens=3)
    given = prompts_of(source, texts)
    assert [list(prompt) for prompt in given] == [[7, 6, 5], [9, 8, 7]]
    documents, tally = written(models, 5000, given, judged=False, prompts=Text("c"), prompt_tokens=3)
    assert len(documents) > BLOCK
    for index, document in enumerate(documents):
        np.testing.assert_array_equal(document[:3], given[index % 2])
        assert 3 <= len(document) <= LONGEST
    assert len({document.tobytes() for document in documents}) > 100
    assert tally.card() == {"candidates": tally.drawn, "candidate_tokens": tally.tokens, "kept": 1.0}
    with pytest.raises(UserError, match="no document of the prompts has more than 3 tokens"):
        prompts_of(source, texts[:2])


def test_what_is_searched_for_is_one_text_of_each_prompt_and_more_probable(models):
    given = [np.array([a, b], np.int32) for a in range(4, 16) for b in range(4, 16)]
    how = {"prompts": Text("c"), "prompt_tokens": 2}
    found, tally = written(models, 200, given, judged=False, beams=4, **how)
    assert len({tuple(document[:2]) for document in found}) == len(found) <= tally.drawn == len(given)
    drawn = written(models, 200, given, judged=False, **how)[0]
    assert np.mean(scores(models[0], found, 2, LONGEST)) > np.mean(scores(models[0], drawn, 2, LONGEST)) + 0.1
    with pytest.raises(UserError, match=r"144 prompts gave .* tokens by beam search, and tokens=9000"):
        written(models, 9000, given, judged=False, beams=4, **how)


# ------------------------------------------------------------------ in a lineage
@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("writing")
    tiny.write_corpus(place)
    return place


def family(folder, *texts, model=MODEL, **judge):
    """A counting root, a decoder, and one reader a text."""
    corpus = TextFiles(str(folder / "corpus.txt"))
    words = TrainedTokenizer(Words(), Text(corpus))
    training = Training(steps=2, batch_size=4, sequence_length=16)
    root = Node("judge", 0, NGram(), words, Lesson((Text(corpus),)))
    root = dataclasses.replace(root, **judge)
    alone = Lesson((Text(corpus, tokens=400),), objective=TEXT_ALONE, training=training)
    nodes = [root, Node("writer", 0, model, words, alone)]
    for number, text in enumerate(texts):
        nodes.append(Node(f"reader-{number}", 1, model, words, dataclasses.replace(alone, text=(text,))))
    return Lineage("family", tuple(nodes), None)


def asked(folder):
    prompts = Text(TextFiles(str(folder / "corpus.txt")), tokens=500)
    given = {"by": "writer@0", "tokens": 120, "max_length": 10}
    return [
        Written(**given),
        Written(**given, best_of=2, keep=0.5, judge="judge@0"),
        Written(**given, prompts=prompts, prompt_tokens=3, keep=0.5),
    ]


@pytest.fixture(scope="module")
def run(folder):
    lineage = family(folder, *asked(folder))
    store = Store(folder / "runs" / "family", lineage)
    planned = {row.key: row for row in plan(lineage, store)}
    grow(lineage, store.run, view=Silent())
    return store, planned


def test_the_card_says_how_a_text_was_chosen_and_by_whom(run):
    store, _ = run
    plain, best, prompted = (store.record(store.lineage[f"reader-{i}@1"])["data"][0] for i in range(3))
    assert not {"chosen", "prompts"} & set(plain)
    identities = store.lineage.identities
    assert best["chosen"]["judge"] == {"key": "judge@0", "identity": identities["judge@0"]}
    assert (best["chosen"]["best_of"], best["chosen"]["keep"], best["chosen"]["kept"]) == (2, 0.5, 0.5)
    assert best["chosen"]["candidates"] == 2 * BLOCK
    assert best["chosen"]["score_of_kept"] > best["chosen"]["score_of_candidates"]
    assert prompted["chosen"]["judge"]["key"] == "writer@0"
    assert (prompted["prompts"]["prompt_tokens"], prompted["prompts"]["tokens"]) == (3, 500)
    assert prompted["parents"] == plain["parents"] == [{"key": "writer@0", "identity": identities["writer@0"]}]


def test_a_completed_text_holds_its_prompts(run):
    store, _ = run
    materials, source = Materials(store), store.lineage["reader-2@1"].lesson.text[0]
    given = {prompt.tobytes() for prompt in materials.prompts(source)}
    documents = materials.documents(source, store.lineage["reader-2@1"].tokenizer)
    assert {document[:3].tobytes() for document in documents} <= given
    assert max(map(len, documents)) <= 10


def test_a_text_that_was_lost_is_written_again_the_same(run):
    store, _ = run
    for number in (1, 2):
        node = store.lineage[f"reader-{number}@1"]
        source = node.lesson.text[0]
        before = Materials(store).documents(source, node.tokenizer)
        shutil.rmtree(store.written(source))
        again = Materials(store).documents(source, node.tokenizer)
        for one, other in zip(before, again, strict=True):
            np.testing.assert_array_equal(one, other)


def test_candidates_and_judging_are_planned_and_counted(run):
    store, planned = run
    materials = Materials(store)
    for number, key in enumerate(["reader-0@1", "reader-1@1", "reader-2@1"]):
        node = store.lineage[key]
        source, sized = node.lesson.text[0], materials.filled(node)
        training = 2 * 4 * 16 * flops_per_token(sized, 16, training=True)
        each = flops_per_token(sized, 10, training=False)
        readings = [1, 1, 2][number]  # the second is judged by a model that counts, the third by the writer
        assert planned[key].flops == training + round(120 * source.best_of / source.keep * each * readings)
        card = store.record(node)["data"][0]
        drawn = card["tokens"] if number == 0 else card["chosen"]["candidate_tokens"]
        assert store.record(node)["flops"] == training + drawn * each * readings


def test_a_reader_whose_run_was_killed_behind_the_writing_has_still_paid_for_it(run):
    store, _ = run
    node = store.lineage["reader-0@1"]
    before = store.record(node)["flops"]
    shutil.rmtree(store.directory(node))
    grow(store.lineage, store.run, view=Silent())
    assert store.record(node)["flops"] == before


def test_a_text_that_two_read_is_planned_once(folder):
    text = asked(folder)[2]
    lineage = family(folder, text, text)
    one, two = (row.flops for row in plan(lineage, Store(folder / "runs" / "planned", lineage))[2:])
    assert one > two


def test_the_judge_is_a_parent_and_part_of_what_is_written(folder):
    text = Written("writer@0", 100, best_of=2, judge="judge@0")
    lineage, other = family(folder, text), family(folder, text, seed=0, model=MODEL)
    assert lineage["reader-0@1"].parents == (("writer@0", "text"), ("judge@0", "judge"))
    other = family(folder, text, lesson=Lesson((Text(TextFiles(str(folder / "corpus.txt")), tokens=900),)))
    assert lineage.identities["writer@0"] == other.identities["writer@0"]
    assert lineage.identities["reader-0@1"] != other.identities["reader-0@1"]
    assert Store(folder / "runs" / "x", lineage).written(text) != Store(folder / "runs" / "x", other).written(text)
    with pytest.raises(UserError, match="learns from 'nobody@0', which is not in the lineage"):
        family(folder, dataclasses.replace(text, judge="nobody@0"))


def test_texts_that_are_drawn_as_before_have_the_identity_that_they_had():
    assert fingerprint(Written("a@0", 7)) == "7403b1d272b553ff"
    assert fingerprint(Written("teacher@0", 80000, top_k=5)) == "9a21ded525ea4c39"
    changes = [{"best_of": 2}, {"keep": 0.5}, {"best_of": 2, "judge": "b@0"}]
    changes.append({"prompts": Text("c"), "prompt_tokens": 1})
    assert len({fingerprint(Written("a@0", 7, **change)) for change in changes} | {"7403b1d272b553ff"}) == 5


def test_a_model_card_tells_how_texts_were_chosen(run):
    store, _ = run
    words = [lesson_in_words(store.lineage[f"reader-{i}@1"].lesson, 0)[0].value for i in range(3)]
    assert words[0] == "text written by writer@0 (120 tokens, temperature 1)"
    assert "the best of 2 candidates each, the best 0.5 of all documents for judge@0" in words[1]
    assert "behind the first 3 of each document of split train of" in words[2]
    records = [store.record(store.lineage[f"reader-{i}@1"]) for i in range(3)]
    assert [len(real_texts(record)) for record in records] == [0, 0, 1]
    json.dumps(records, allow_nan=False)


# ------------------------------------------------------------------ refused
@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"best_of": 0}, "best_of=0 must be at least 1"),
        ({"keep": 0.0}, "keep=0.0 is a share"),
        ({"keep": 1.5}, "keep=1.5 is a share"),
        ({"judge": "b@0"}, "nothing to judge for 'b@0': set best_of or keep"),
        ({"verifier": "v"}, "nothing to judge for 'v': set best_of or keep"),
        ({"verifier": "v", "judge": "b@0", "keep": 0.5}, "judge='b@0' and a verifier: choose one"),
        ({"rule": 3}, "rule=3 is no function of a text"),
        ({"beams": 2}, "beams=2 finds one text of each prompt"),
        ({"beams": 2, "prompts": Text("c"), "prompt_tokens": 2, "top_k": 3}, "no temperature, top_k"),
        ({"beams": 2, "prompts": Text("c"), "prompt_tokens": 2, "marks": (GreenList(1),)}, "best_of, draw or marks"),
        ({"prompts": Text("c")}, "prompt_tokens=0 and a text of prompts: set both"),
        ({"prompt_tokens": 2}, "prompt_tokens=2 and no text of prompts: set both"),
        ({"prompts": Text("c"), "prompt_tokens": 256}, "prompt_tokens=256 leaves nothing to write of max_length=256"),
    ],
)
def test_what_makes_no_sense_is_refused(how, message):
    with pytest.raises(UserError, match=message):
        Written("a@0", 10, **how)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"keep": 0.001}, "keep=0.001 is less than one document of the 256"),
        ({"prompt_tokens": 31}, "prompt_tokens=31, and the longest document that it writes has 31 tokens"),
        ({"prompt_tokens": 30}, "no document of the prompts has more than 30 tokens"),
    ],
)
def test_what_does_not_fit_the_writer_is_refused_before_anything_is_grown(how, message, folder):
    if "prompt_tokens" in how:
        how = how | {"prompts": Text(TextFiles(str(folder / "corpus.txt")))}
    lineage = family(folder, Written("writer@0", 100, **how))
    with pytest.raises(UserError, match=message):
        grow(lineage, folder / "runs" / "refused", view=Silent())
    assert not list((folder / "runs" / "refused").glob("nodes/*"))


def test_marks_are_of_what_a_decoder_draws_and_their_names_are_on_the_card(folder):
    marked = Written("writer@0", 120, max_length=10, marks=(GreenList(5, delta=9.0),))
    lineage = family(folder, marked, dataclasses.replace(marked, best_of=2))
    store = Store(folder / "runs" / "marked", lineage)
    grow(lineage, store.run, view=Silent())
    materials = Materials(store)
    for number, source in enumerate((marked, dataclasses.replace(marked, best_of=2))):
        assert store.record(lineage[f"reader-{number}@1"])["data"][0]["marks"] == ["GreenList"]
        documents = materials.documents(source, lineage["writer@0"].tokenizer)
        pairs = {(*np.r_[1, 1, d][n : n + 2].tolist(), int(d[n])) for d in documents for n in range(len(d))}
        rows = np.array(sorted(pairs), np.int32)
        hashed = jax.jit(lambda before, token: hashes(seeds(5, before), token))(rows[:, :2], rows[:, 2:])
        assert np.mean(is_green(hashed[:, 0], 0.5)) > 0.9
    assert "temperature 1, with GreenList" in lesson_in_words(lineage["reader-0@1"].lesson, 0)[0].value
    counts = family(folder, dataclasses.replace(marked, by="judge@0"))
    with pytest.raises(UserError, match="'judge@0' counts, and marks change what a decoder draws"):
        grow(counts, folder / "runs" / "counts", view=Silent())


def test_a_judge_with_another_tokenizer_is_refused(folder):
    corpus = TextFiles(str(folder / "corpus.txt"))
    text = Written("writer@0", 100, best_of=2, judge="judge@0")
    lineage = family(folder, text, tokenizer=TrainedTokenizer(Bytes(), Text(corpus)))
    with pytest.raises(UserError, match="'writer@0' writes and its judge 'judge@0' reads another tokenizer"):
        grow(lineage, folder / "runs" / "judges", view=Silent())
