"""A model card tells a stranger the truth, and what others wrote into records cannot break it."""

import json
import re
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from epigone.data.corpora import TextFiles
from epigone.data.tokenizers import Words
from epigone.identity import canonical
from epigone.lessons.objective import TEXT_ALONE, Objective
from epigone.lineage import Evaluation, Lesson, Lineage, Node, Pretrained, Text, TrainedTokenizer, Written
from epigone.models.config import DecoderConfig
from epigone.models.ngram import NGram
from epigone.opened import OpenedNode, open_node
from epigone.store import Store
from epigone.training.config import Training
from epigone.verbs.licences import Source, recognised, summary
from epigone.verbs.model_card import QWEN_WORDS, _tokenizer, model_card

CORPUS = TextFiles("/home/somebody/private/verses.txt")
WORDS = TrainedTokenizer(Words(), Text(CORPUS))
MODEL = DecoderConfig(layers=1, model_size=16, heads=2, max_length=32)
CARD = {"name": "Verses", "licence": "public domain; package MIT", "split": "train", "documents": 1200, "bytes": 34567}
CARD |= {"sha256": "ab" * 32}


@dataclass(frozen=True)
class Run:
    """Records of a small lineage, written by hand."""

    path: Path
    lineage: Lineage

    def record(self, key: str, **more: Any) -> None:
        """Write a node's record as `grow` does, with fields changed or (None) left out."""
        store, node = Store(self.path, self.lineage), self.lineage[key]
        identities = self.lineage.identities
        plain = {
            "key": key,
            "identity": identities[key],
            "kind": "ngram" if isinstance(node.model, NGram) else "decoder",
            "config": canonical(node),
            "parents": [{"key": k, "identity": identities[k], "role": role} for k, role in node.parents],
            "data": [CARD] if any(isinstance(text, Text) for text in node.lesson.text) else [],
            "parameters": 1_234_567,
            "seconds": 61.5,
            "git_commit": "0123abcd",
            "versions": {"jax": "0.10.2"},
            "device": "1 x cpu",
        }
        store.write_record(node, {k: v for k, v in (plain | more).items() if v is not None})

    def card(self, key: str) -> str:
        return model_card(self.opened(key), "llama", "float32")

    def opened(self, key: str) -> OpenedNode:
        return open_node(key, self.path)


@pytest.fixture
def run(tmp_path):
    """An imported teacher, a trigram that writes, and a student of both that also starts from the teacher."""
    text = Text(CORPUS)
    big = Node("big", 0, MODEL, WORDS, Lesson(source=Pretrained("/home/somebody/models/Big-1.7B.gguf", "d1ge57")))
    writer = Node("writer", 0, NGram(), WORDS, Lesson((text,)))
    training = Training(steps=30, batch_size=4, sequence_length=16)
    lesson = Lesson((text, Written("writer@0", 500)), teacher="big@0", start_from="big@0", training=training)
    student = Node("student", 1, MODEL, WORDS, replace(lesson, objective=Objective(temperature=2.0, hard_weight=0.25)))
    lineage = Lineage("family", (big, writer, student), Evaluation(Text(CORPUS, "test"), text))
    made = Run(tmp_path / "run", lineage)
    store = Store(made.path, lineage)
    store.write_lineage()
    store.tokenizer(WORDS).parent.mkdir()
    Words().build(["the cat sees the dog"]).save(store.tokenizer(WORDS))
    source = {"path": "/home/somebody/models/Big-1.7B.gguf", "licence": "apache-2.0", "files": {"Big.gguf": "f" * 64}}
    made.record("big@0", source=source)
    made.record("writer@0")
    metrics = {"perplexity": 12.345678, "nats_per_token": 2.5131, "nats_per_token_error": 0.0123, "ece": 0.0456}
    agreement = {"big@0": {"top1": 0.61, "forward_kl": 0.321, "reverse_kl": "inf"}}
    written = {"name": "text of writer@0", "parents": [{"key": "writer@0", "identity": "0" * 16}], "tokens": 512}
    counts = {"tokens": 1920, "flops": 3.21e9, "data": [CARD, written]}
    made.record("student@1", metrics=metrics, agreement=agreement, **counts)
    return made


QWEN = {
    "normalizer": {"type": "NFC"},
    "pre_tokenizer": {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": QWEN_WORDS}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
        ],
    },
}


def test_a_tokenizer_that_transformers_would_replace_says_how_to_load_it(run):
    opened = run.opened("student@1")
    assert "PreTrainedTokenizerFast" not in model_card(opened, "llama", "float32")
    card = model_card(opened, "qwen2", "float32")
    assert "PreTrainedTokenizerFast.from" in card.replace("\\", "")
    for described, told in ((QWEN, False), ({**QWEN, "normalizer": None}, True)):
        inner = SimpleNamespace(to_str=partial(json.dumps, described))
        tokenizer = SimpleNamespace(inner=inner, conventions=object())
        assert bool(_tokenizer(SimpleNamespace(tokenizer=tokenizer), "qwen2")) == told


def test_the_cuts_of_qwen_are_those_of_transformers():
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    assert QWEN_WORDS == PRETOKENIZE_REGEX


def front(card: str) -> dict[str, Any]:
    """The front matter, as YAML reads it."""
    _, matter, _ = card.split("---\n", 2)
    return yaml.safe_load(matter)


def table(card: str, heading: str) -> list[list[str]]:
    """The cells of the rows of the table under a heading."""
    section = card.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows[2:]]


def test_a_student_says_whence_how_and_how_good(run):
    card = run.card("student@1")
    assert card.startswith("---\nlicense: ")
    assert front(card) == {
        "license": "apache-2.0",
        "base_model": ["Big-1.7B"],
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["epigone", "distillation", "synthetic-data"],
        "datasets": ["Verses"],
    }
    assert "**A language model of 1.23 M parameters that learned to predict as big@0 does, on Verses, " in card
    assert "0.75 x (forward KL to big@0 at temperature 2, times temperature squared) + 0.25 x cross-entropy" in card
    assert "Start: the weights of big@0; seed 0" in card
    assert "30 steps of 4 rows of 16 tokens" in card
    assert "text written by writer@0 (500 tokens, temperature 1)" in card
    assert run.lineage.identities["student@1"] in card
    assert "- Wall time: 62 s" in card
    assert "- Floating-point operations: 3.21e+09" in card
    assert "- Finished: unknown" in card
    assert "On held-out text: split test of verses.txt." in card


def test_measures_are_those_of_the_record_and_no_others(run):
    assert table(run.card("student@1"), "Measures") == [
        ["Nats per token", "2.513 ± 0.0123 (standard error over documents)"],
        ["Perplexity per token", "12.35"],
        ["Expected calibration error", "0.0456"],
        ["Same most probable token as big@0", "0.61"],
        [r"KL(big@0 \|\| this), nats", "0.321"],
        [r"KL(this \|\| big@0), nats", "inf"],
    ]
    card = run.card("big@0")
    assert "None was taken." in card
    assert "| Perplexity of held-out text | not measured |" in card


def test_the_lineage_is_a_tree_to_the_roots(run):
    card = run.card("student@1")
    mark = {key: identity[:8] for key, identity in run.lineage.identities.items()}
    assert card.partition("```text\n")[2].partition("\n```")[0].splitlines() == [
        f"student@1 [{mark['student@1']}] (decoder, read Verses; 1.23 M parameters) <- this model",
        f"├─ teacher: big@0 [{mark['big@0']}] (imported from Big-1.7B.gguf; 1.23 M parameters)",
        f"├─ start: big@0 [{mark['big@0']}] as above",
        f"└─ text: writer@0 [{mark['writer@0']}] (ngram, read Verses; 1.23 M parameters)",
    ]


def test_a_long_chain_is_counted_where_it_is_not_drawn(tmp_path, run):
    first = run.lineage["writer@0"]
    nodes = [first]
    for generation in range(1, 200):
        nodes.append(replace(first, name="copy", generation=generation, lesson=Lesson((Written(nodes[-1].key, 9),))))
    last = Node("last", 200, MODEL, WORDS, Lesson((Written("copy@199", 9),), objective=TEXT_ALONE, training=Training()))
    chain = Run(run.path, Lineage("chain", (*nodes, last), run.lineage.evaluation))
    Store(run.path, chain.lineage).write_lineage()
    for node in chain.lineage.nodes:
        chain.record(node.key)
    card = chain.card("last@200")
    drawn = card.partition("```text\n")[2].partition("\n```")[0].splitlines()
    assert len(drawn) == 7
    assert drawn[-1].strip() == "└─ ... and the 195 ancestors before"
    assert table(card, "Licences")[0] == ["text read by writer@0: Verses", "public domain; package MIT"]


def test_every_licence_of_the_chain_is_listed(run):
    assert table(run.card("student@1"), "Licences") == [
        ["text read by student@1: Verses", "public domain; package MIT"],
        ["weights of big@0: Big-1.7B.gguf", "apache-2.0"],
        ["text read by writer@0: Verses", "public domain; package MIT"],
    ]
    assert "The front matter says `apache-2.0`" in run.card("student@1")


def test_what_is_unknown_is_called_unknown(run):
    run.record("big@0", source={"path": "Big-1.7B.gguf", "licence": None, "files": {}})
    run.record("writer@0", data=[{"name": "Heard somewhere"}])
    card = run.card("student@1")
    assert front(card)["license"] == "other"
    rows = table(card, "Licences")
    assert ["weights of big@0: Big-1.7B.gguf", "unknown (not recognised)"] in rows
    assert ["text read by writer@0: Heard somewhere", "unknown (not recognised)"] in rows
    assert ["Heard somewhere", *["unknown"] * 4, "writer@0"] in table(card, "Data")
    assert "no single one is clear" in card


def test_an_ancestor_whose_record_is_gone_is_not_forgotten(run):
    (Store(run.path, run.lineage).directory(run.lineage["writer@0"]) / "record.json").unlink()
    card = run.card("student@1")
    assert "(its record is gone: unknown)" in card
    assert ["what writer@0 learned from (its record is gone)", "unknown (not recognised)"] in table(card, "Licences")
    assert front(card)["license"] == "other"


HOSTILE = [
    'a "quoted": name\n---\nlicense: mit',
    "| pipes | and\r\n\n## a heading",
    "```\n</details><script>alert(1)</script>",
    "bell\x07 next\x85line sep\u2028arator \ud800 half",
    "{{ 7 * 7 }} {% raw %} [link](http://nowhere) *bold* \\",
    "漢字 😀 - : # & ! %",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_text_from_outside_is_only_text(run, text):
    plain = run.card("student@1")
    run.record("big@0", source={"path": text, "licence": text, "files": {text: "0" * 64}})
    run.record("writer@0", data=[{**CARD, "name": text, "licence": text, "split": text}])
    card = run.card("student@1")
    card.encode()
    assert list(front(card)) == ["license", "license_name", "license_link", *list(front(plain))[1:]]
    assert front(card)["license"] == "other"
    assert re.findall(r"^#+ .*", card, re.M) == re.findall(r"^#+ .*", plain, re.M)
    assert card.count("\n```") == plain.count("\n```")
    shown = re.sub(r"\A---.*?\n---\n|^```.*?^```", "", card, flags=re.M | re.S)
    assert "<script" not in shown
    assert "[link]" not in shown
    assert len(table(card, "Licences")) == 3
    assert {len(row) for row in table(card, "Licences")} == {2}
    assert {len(row) for row in table(card, "Data")} == {6}


def test_no_place_on_this_machine_is_told(run):
    for key in ("student@1", "big@0"):
        assert "somebody" not in run.card(key)


@pytest.mark.parametrize(
    ("licences", "expected"),
    [
        (["apache-2.0"], "apache-2.0"),
        (["MIT", "Apache License, Version 2.0"], "apache-2.0"),
        (["public domain in the United States; package MIT"], "mit"),
        (["CC0", "mit", "BSD-3-Clause"], "bsd-3-clause"),
        (["gpl-3.0", "GPL-3.0"], "gpl-3.0"),
        (["llama3.2", "Llama 3.2 License"], "llama3.2"),
        (["gpl-3.0", "mit"], "other"),
        (["cc-by-nc-4.0", "cc-by-4.0"], "other"),
        (["mit", None], "other"),
        (["mit", "not stated"], "other"),
        (["mit", "BSD"], "other"),
        (["mit, but not on Sundays"], "other"),
        (["public domain"], "other"),
        ([], "other"),
    ],
)
def test_one_licence_only_where_the_chain_has_one(licences, expected):
    assert summary([Source("something", licence) for licence in licences]) == expected


def test_a_licence_is_recognised_by_its_name_alone():
    assert recognised("public domain; package MIT") == ["public domain", "mit"]
    assert recognised("free as in beer") is None
    assert recognised("") is None
