import json
import os

import numpy as np
import pytest
import tensorflow_datasets as tfds
from hypothesis import given
from hypothesis import strategies as st
from object_stores import trouble

from epigone.data.corpora import Documents, Noised, TextFiles, Tfds, slice_documents
from epigone.errors import Fault, UserError
from epigone.storage.places import entries, write_whole

TEXTS = [f"This is document number {index}.\nIt has two lines, é." for index in range(400)]


def write_txt(path, texts=TEXTS):
    path.write_text("\n\n  \n".join(texts) + "\n", encoding="utf-8")


def write_jsonl(path, texts=TEXTS):
    path.write_text("".join(json.dumps({"text": text, "id": 1}) + "\n" for text in texts), encoding="utf-8")


def write_parquet(path, texts=TEXTS):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"text": texts, "id": list(range(len(texts)))}), path)


WRITERS = {"a.txt": write_txt, "a.jsonl": write_jsonl, "a.parquet": write_parquet}


@pytest.fixture
def data(tmp_path):
    return tmp_path / "data"


@pytest.mark.parametrize("name", WRITERS)
def test_every_document_of_a_file_falls_into_one_split(tmp_path, data, name):
    WRITERS[name](tmp_path / name)
    splits = TextFiles(str(tmp_path / name)).prepare(data)
    assert list(splits) == ["train", "validation", "test"]
    assert sorted(text for documents in splits.values() for text in documents) == sorted(TEXTS)
    order = [TEXTS.index(text) for text in splits["train"]]
    assert order == sorted(order)
    assert 330 < len(order) < 385
    assert splits["train"].card["documents"] == len(order)


def test_a_pattern_reads_all_its_files_in_order(tmp_path, data):
    (tmp_path / "deep").mkdir()
    write_txt(tmp_path / "b.txt", ["third"])
    write_jsonl(tmp_path / "deep" / "c.jsonl", ["fourth"])
    write_txt(tmp_path / "a.txt", ["first", "second"])
    corpus = TextFiles(str(tmp_path / "**" / "*.*"), shares=(1.0, 0.0, 0.0))
    assert corpus.splits == ("train",)
    assert list(corpus.prepare(data)["train"]) == ["first", "second", "third", "fourth"]


def test_equal_documents_never_lie_in_two_splits(tmp_path, data):
    write_txt(tmp_path / "a.txt", TEXTS + TEXTS)
    splits = TextFiles(str(tmp_path / "a.txt")).prepare(data)
    train, validation, test = (set(splits[split]) for split in splits)
    assert not train & validation
    assert not train & test
    assert not validation & test


def test_a_file_that_changes_is_prepared_again(tmp_path, data):
    corpus = TextFiles(str(tmp_path / "a.txt"), shares=(1, 0, 0))
    write_txt(tmp_path / "a.txt", ["old"])
    assert list(corpus.prepare(data)["train"]) == ["old"]
    write_txt(tmp_path / "a.txt", ["new"])
    os.utime(tmp_path / "a.txt", ns=(1, 1))
    assert list(corpus.prepare(data)["train"]) == ["new"]


def test_other_fields_and_empty_lines(tmp_path, data):
    (tmp_path / "a.jsonl").write_text('\ufeff{"body": "one"}\n\n{"body": "  "}\n{"body": "two "}\n', encoding="utf-8")
    assert list(TextFiles(str(tmp_path / "a.jsonl"), "body", (1, 0, 0)).prepare(data)["train"]) == ["one", "two"]


BAD = [
    ("a.txt", b"", "has no text: every file that matches is empty"),
    ("a.txt", b" \n\n\t\n", "has no text: every file that matches is empty"),
    ("a.txt", b"one\n\ncaf\xe9\n", "a.txt is not UTF-8: byte 8 cannot be decoded"),
    ("a.txt", b"one", "has no document for split 'validation'"),
    ("a.jsonl", b"", "has no text"),
    ("a.jsonl", b'{"text": "x"}\n{"txt": "y"}\n', "a.jsonl, line 2: no field 'text'; it has 'txt'"),
    ("a.jsonl", b'{"text": "x"}\n[1]\n', "a.jsonl, line 2: no field 'text'$"),
    ("a.jsonl", b'{"text": "x"}\n{"text"\n', "a.jsonl, line 2: not JSON"),
    ("a.jsonl", b'{"text": null}\n', "a.jsonl, line 1: field 'text' is NoneType, not text"),
    ("a.jsonl", b'{"text": "\\ud800"}\n', "a.jsonl, line 1: half a character"),
    ("a.parquet", b"not parquet", "a.parquet is no Parquet file"),
    ("a.parquet", b"", "a.parquet is no Parquet file"),
    ("a.csv", b"text\n", "a.csv: cannot read '.csv' files; known are .txt, .jsonl, .parquet"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD)
def test_a_file_that_cannot_be_used_says_why_in_one_line(tmp_path, data, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        TextFiles(str(tmp_path / name)).prepare(data)
    assert "\n" not in str(caught.value)
    assert not data.exists() or not list(data.iterdir())


def test_a_parquet_column_that_is_missing_or_no_text_says_so(tmp_path, data):
    write_parquet(tmp_path / "a.parquet")
    with pytest.raises(UserError, match="no column 'body'; it has 'text', 'id'"):
        TextFiles(str(tmp_path / "a.parquet"), "body").prepare(data)
    with pytest.raises(UserError, match="row 1: field 'id' is int, not text"):
        TextFiles(str(tmp_path / "a.parquet"), "id").prepare(data)


def test_a_damaged_parquet_file_says_so(tmp_path, data):
    write_parquet(tmp_path / "a.parquet", [os.urandom(50).hex() for _ in range(2000)])
    content = bytearray((tmp_path / "a.parquet").read_bytes())
    content[100:4000] = bytes(3900)
    (tmp_path / "a.parquet").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.parquet"):
        TextFiles(str(tmp_path / "a.parquet")).prepare(data)


def test_no_file_or_bad_shares_say_so(tmp_path, data):
    with pytest.raises(UserError, match=r"no file matches '.*nothing\*'"):
        TextFiles(str(tmp_path / "nothing*")).prepare(data)
    with pytest.raises(UserError, match="are not three parts of 1"):
        TextFiles("x", shares=(0.9, 0.2, 0.1)).prepare(data)


def test_noise_replaces_its_share_of_the_words_by_others_of_the_text(tmp_path, data):
    write_txt(tmp_path / "a.txt")
    clean = TextFiles(str(tmp_path / "a.txt"))
    noised = Noised(clean, 0.25)
    assert noised.splits == clean.splits
    before, after = clean.prepare(data)["train"], noised.prepare(data)["train"]
    texts = zip(before, after, strict=True)
    pairs = [pair for ours, theirs in texts for pair in zip(ours.split(), theirs.split(), strict=True)]
    assert {new for _, new in pairs} <= {old for old, _ in pairs}
    # Of what is replaced one word in ten or so is replaced by itself: 10 different ones, and numbers.
    changed = np.mean([old != new for old, new in pairs])
    assert abs(changed - 0.25 * 0.9) < 0.03
    assert after.card["noise"] == {"share": 0.25, "seed": 0}
    assert after.card["sha256"] != before.card["sha256"]
    assert list(Noised(clean, 0.25, seed=1).prepare(data)["train"]) != list(after)
    assert list(Noised(clean, 0.0).prepare(data)["train"]) == [" ".join(text.split()) for text in before]
    write_txt(tmp_path / "a.txt", TEXTS[:300])
    assert len(noised.prepare(data)["train"]) < len(after)
    with pytest.raises(UserError, match=r"share=1\.5"):
        Noised(clean, 1.5).prepare(data)


class TinyStories(tfds.core.GeneratorBasedBuilder):
    """A registered data set, shuffled by TFDS as most are."""

    VERSION = tfds.core.Version("1.0.0")
    name = "epigone_tiny_stories"

    def _info(self):
        features = tfds.features.FeaturesDict({"story": tfds.features.Text(), "stars": np.int64})
        return tfds.core.DatasetInfo(builder=self, features=features, homepage="https://example.org", license="CC0")

    def _split_generators(self, _):
        return {"train": self._generate_examples(0, 50), "held": self._generate_examples(50, 60)}

    def _generate_examples(self, first, last):
        for index in range(first, last):
            yield index, {"story": TEXTS[index], "stars": index}


TINY = Tfds("epigone_tiny_stories", "story", "train[:80%]", "train[80%:]", "held")


def test_a_registered_data_set(data):
    splits = TINY.prepare(data)
    assert list(splits) == list(TINY.splits) == ["train", "validation", "test"]
    assert [len(documents) for documents in splits.values()] == [40, 10, 10]
    assert sorted([*splits["train"], *splits["validation"]]) == sorted(TEXTS[:50])
    assert sorted(splits["test"]) == sorted(TEXTS[50:60])
    card = splits["test"].card
    assert card["name"] == "tfds:epigone_tiny_stories/1.0.0"
    assert card["licence"] == "CC0"
    assert card["documents"] == 10
    assert card["bytes"] == sum(len(text.encode()) for text in TEXTS[50:60])
    assert splits["train"].card["sha256"] != splits["validation"].card["sha256"]
    again = TINY.prepare(data)
    assert again["train"].card == splits["train"].card
    assert list(again["train"]) == list(splits["train"])


def test_splits_can_be_left_out(data):
    corpus = Tfds("epigone_tiny_stories", "story", validation_split="held", test_split="")
    assert list(corpus.prepare(data)) == ["train", "validation"]


@pytest.mark.parametrize(
    ("corpus", "message"),
    [
        (Tfds("lm1bb"), "TFDS has no data set 'lm1bb'; did you mean 'lm1b'?"),
        (Tfds("epigone_tiny_stories"), "has no feature 'text'; it has story, stars"),
        (Tfds("epigone_tiny_stories", "stars"), "feature 'stars' of 'epigone_tiny_stories' is not text: Tensor"),
        (Tfds("epigone_tiny_stories", "story"), "has no split 'validation'; it has train, held"),
        (Tfds("epigone_tiny_stories", "story", "train[:x]"), r"has no split 'train\[:x\]'"),
        (Tfds("epigone_tiny_stories:9.9.9", "story"), "TFDS cannot open 'epigone_tiny_stories:9.9.9': .*9.9.9.*1.0.0"),
        (Tfds("not a name!"), "TFDS has no data set 'not a name!'"),
    ],
)
def test_what_tfds_does_not_know_is_one_line(data, corpus, message):
    with pytest.raises(UserError, match=message) as caught:
        corpus.prepare(data)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["truncated", "gone"])
def test_a_damaged_tfds_data_set_is_a_fault(data, kind):
    TINY.prepare(data)
    file = next(data.rglob("*train.array_record*"))
    file.write_bytes(file.read_bytes()[:70000]) if kind == "truncated" else file.unlink()
    with pytest.raises(Fault, match=r"damaged|cannot be read") as caught:
        list(TINY.prepare(data)["train"])
    assert "\n" not in str(caught.value)


@pytest.fixture
def downloaded(tmp_path, monkeypatch):
    """TFDS believes that what it would download lies here already."""
    directory = tmp_path / "downloaded"
    directory.mkdir()

    def lies_here(_, wanted):
        return dict.fromkeys(wanted, directory) if isinstance(wanted, dict) else directory

    monkeypatch.setattr(tfds.download.DownloadManager, "download_and_extract", lies_here)
    return directory


def test_a_data_set_of_the_catalogue(data, downloaded):
    (downloaded / "ag_news_csv").mkdir()
    for split, texts in (("train", TEXTS[:20]), ("test", TEXTS[20:30])):
        rows = "".join(f'"1","title","{text}"\n' for text in texts)
        (downloaded / "ag_news_csv" / f"{split}.csv").write_text(rows, encoding="utf-8")
    splits = Tfds("ag_news_subset", "description", "train[:50%]", "train[50%:]").prepare(data)
    assert sorted([*splits["train"], *splits["validation"]]) == sorted(TEXTS[:20])
    assert sorted(splits["test"]) == sorted(TEXTS[20:30])
    assert splits["test"].card["name"] == "tfds:ag_news_subset/1.0.0"


def test_a_data_set_that_only_tensorflow_can_prepare_says_so(data, downloaded):
    with pytest.raises(UserError, match=r"preparing 'lm1b' \(not reading it\) needs the package 'tensorflow'"):
        Tfds("lm1b", validation_split="test", test_split="").prepare(data)


DOCUMENTS = [np.arange(size, dtype=np.int32) for size in range(1, 40)]


def ids(documents):
    return [id(document) for document in documents]


@given(st.integers(0, 700))
def test_two_slices_are_disjoint_and_together_everything(tokens):
    first = slice_documents(DOCUMENTS, 0, tokens) if tokens else []
    rest = slice_documents(DOCUMENTS, tokens, None)
    assert ids(first + rest) == ids(slice_documents(DOCUMENTS, 0, None))
    assert sorted(ids(first + rest)) == sorted(ids(DOCUMENTS))


@given(st.integers(0, 300), st.integers(1, 300))
def test_slices_that_adjoin_share_no_document_and_leave_none_out(skip, tokens):
    try:
        first, second = slice_documents(DOCUMENTS, skip, tokens), slice_documents(DOCUMENTS, skip + tokens, tokens)
    except UserError:
        return  # the text has no document that ends between the two places
    together = slice_documents(DOCUMENTS, skip, 2 * tokens)
    assert ids(first + second) == ids(together)
    longest = max(len(document) + 1 for document in DOCUMENTS)
    assert abs(sum(len(document) + 1 for document in first) - tokens) < longest


def test_a_slice_from_the_start_reaches_its_tokens_with_its_last_document():
    for tokens in (1, 50, 300):
        sizes = [len(document) + 1 for document in slice_documents(DOCUMENTS, 0, tokens)]
        assert sum(sizes[:-1]) < tokens <= sum(sizes)


def test_a_slice_is_shuffled_and_always_the_same():
    assert ids(slice_documents(DOCUMENTS, 0, None)) != ids(DOCUMENTS)
    assert ids(slice_documents(DOCUMENTS, 20, 50)) == ids(slice_documents(DOCUMENTS, 20, 50))


@pytest.mark.parametrize(("skip", "tokens"), [(0, 820), (819, None), (819, 1), (800, 100), (900, None)])
def test_a_text_that_is_too_short_says_both_numbers(skip, tokens):
    wanted = f"{skip} to skip" + (f" and {tokens} to take" if tokens else "")
    with pytest.raises(UserError, match=f"the text has 819 tokens, too few for {wanted}"):
        slice_documents(DOCUMENTS, skip, tokens)


def test_a_name_of_the_catalogue_is_read_from_mocked_data(tmp_path, monkeypatch):
    """`mock_data` stands for a prepared data set. It can read records one by one; its reading of several at once lacks
    an argument in TFDS 4.9.10, so here they are read one by one."""
    monkeypatch.setattr(Documents, "_rows", lambda self, indices: [self._source[index] for index in indices])
    with tfds.testing.mock_data(num_examples=7):
        splits = Tfds("tfds:lm1b", validation_split="").prepare(tmp_path)
    assert sorted(splits) == ["test", "train"]
    assert len(splits["train"]) == 7
    assert all(isinstance(text, str) for text in splits["train"])
    assert splits["train"].card["name"].startswith("tfds:lm1b")
    assert splits["train"].card["documents"] == 7


def test_data_sets_in_a_bucket_are_prepared_once_and_fetched(s3_folder, tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("\n\n".join(f"text number {i}" for i in range(40)))
    for host in ("one", "two"):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / host))
        splits = TINY.prepare(s3_folder)
        assert list(splits["train"]) == list(TINY.prepare(tmp_path / "disk")["train"])
        files = TextFiles(str(tmp_path / "a.txt"))
        found = {split: list(texts) for split, texts in files.prepare(s3_folder).items()}
        assert found == {split: list(texts) for split, texts in files.prepare(tmp_path / "disk").items()}
        with trouble() as met:
            TINY.prepare(s3_folder)
            files.prepare(s3_folder)
        assert not [request for request in met.requests if request.startswith("PUT")]
    manifests = [name for name in entries(s3_folder) if name.endswith("manifest.json")]
    assert len(manifests) == 2
    assert not [name for name in entries(s3_folder) if "downloads" in name]


def test_text_files_in_a_bucket_are_those_on_a_disk(s3_folder, tmp_path, monkeypatch):
    contents = {"a.txt": "one\n\ntwo", "b.jsonl": '{"text": "three"}', "deep/c.txt": "four\n\nfive"}
    for name, content in contents.items():
        write_whole(s3_folder / "texts" / name, content.encode())
        write_whole(tmp_path / "texts" / name, content.encode())
    found = {}
    for pattern in ("a.txt", "*.txt", "**/*.txt", "b.jsonl"):
        whole = {"shares": (1.0, 0.0, 0.0)}
        for host in ("one", "two"):
            monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / host))
            stored = TextFiles(f"{s3_folder}/texts/{pattern}", **whole).prepare(s3_folder / "data")["train"]
            local = TextFiles(f"{tmp_path}/texts/{pattern}", **whole).prepare(tmp_path / "data")["train"]
            assert list(stored) == list(local)
        found[pattern] = list(stored)
    assert found["*.txt"] == found["a.txt"] == ["one", "two"]
    assert found["**/*.txt"] == ["one", "two", "four", "five"]
    sets = {name.partition("/")[0] for name in entries(s3_folder / "data")}
    assert len(sets) == 3, "prepared once a pattern, whatever the host"
    with pytest.raises(UserError, match=r"no file matches 's3://.*nothing\*'"):
        TextFiles(f"{s3_folder}/texts/nothing*").prepare(tmp_path)
