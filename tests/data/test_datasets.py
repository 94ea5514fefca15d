import errno
import hashlib
import json
import os
import resource
import signal
import subprocess
import sys

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from epigone.data.datasets import open_splits, read_text, write_splits, write_text
from epigone.errors import Fault, UserError

TEXTS = ["In the beginning", "", "Grüße, 世界\nzwei", "x" * 3000, "<eos>"] * 40
CARD = {"name": "text of a@0", "parents": [{"key": "a@0", "identity": "00ff"}], "sampling": {"temperature": 0.7}}


def run(code, **settings):
    start = f"import sys; sys.path[:0] = {sys.path!r}\n"
    return subprocess.run([sys.executable, "-c", start + code], capture_output=True, text=True, **settings)


def test_text_returns_in_order_with_random_access(tmp_path):
    written = write_text(tmp_path / "text", TEXTS, CARD)
    for documents in (written, read_text(tmp_path / "text")):
        assert list(documents) == TEXTS
        assert documents[2] == TEXTS[2]
        assert documents[-1] == TEXTS[-1]
        assert documents[3:9] == TEXTS[3:9]
        assert len(documents) == len(TEXTS)
        with pytest.raises(IndexError):
            documents[len(TEXTS)]


def test_the_card_keeps_what_it_was_given_and_counts_the_rest(tmp_path):
    card = write_text(tmp_path / "text", iter(TEXTS), CARD).card
    content = b"".join(b"%d:" % len(text.encode()) + text.encode() for text in TEXTS)
    assert card == {
        **CARD,
        "split": "train",
        "documents": len(TEXTS),
        "bytes": sum(len(text.encode()) for text in TEXTS),
        "words": sum(len(text.split()) for text in TEXTS),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    assert write_text(tmp_path / "other", TEXTS[::-1], CARD).card["sha256"] != card["sha256"]


def test_token_ids_lie_beside_the_text(tmp_path):
    rng = np.random.default_rng(0)
    ids = [rng.integers(4, 70000, size).astype(np.int32) for size in rng.integers(0, 50, len(TEXTS))]
    write_text(tmp_path / "text", TEXTS, CARD, ids)
    documents = read_text(tmp_path / "text")
    assert list(documents) == TEXTS
    assert documents.card["tokens"] == sum(len(document) + 1 for document in ids)
    stored = documents.tokens()
    assert all(document.dtype == np.int32 for document in stored)
    assert all(np.array_equal(a, b) for a, b in zip(stored, ids, strict=True))


def test_text_alone_has_no_token_ids(tmp_path):
    with pytest.raises(UserError, match="without token ids"):
        write_text(tmp_path / "text", TEXTS, CARD).tokens()


def test_token_ids_that_do_not_match_the_text_are_refused(tmp_path):
    with pytest.raises(Fault, match="cannot write data set"):
        write_text(tmp_path / "text", TEXTS, CARD, [np.zeros(1, np.int32)])
    assert list(tmp_path.iterdir()) == []


def test_it_is_a_tfds_data_set_in_array_record_format(tmp_path):
    import tensorflow_datasets as tfds

    ids = [np.arange(len(text), dtype=np.int32) for text in TEXTS]
    write_text(tmp_path / "text", TEXTS, CARD, ids)
    builder = tfds.builder_from_directory(tmp_path / "text")
    assert builder.info.file_format.value == "array_record"
    assert builder.info.splits["train"].num_examples == len(TEXTS)
    rows = list(builder.as_data_source("train"))
    assert [row["text"].decode() for row in rows] == TEXTS
    assert all(np.array_equal(row["tokens"], given) for row, given in zip(rows, ids, strict=True))


def test_large_text_lies_in_several_files(tmp_path, monkeypatch):
    import tensorflow_datasets as tfds

    monkeypatch.setattr("epigone.data.datasets._SHARD_BYTES", 1000)
    texts = [f"{number} " * 30 for number in range(100)]
    stored = write_text(tmp_path / "text", texts, CARD)
    assert len(list((tmp_path / "text").glob("*array_record*"))) > 5
    assert list(stored) == texts
    assert stored[57] == texts[57]
    builder = tfds.builder_from_directory(tmp_path / "text")
    assert [row["text"].decode() for row in builder.as_data_source("train")] == texts


def damage(directory, kind):
    file = next(directory.glob("*array_record*"))
    content = file.read_bytes()
    if kind == "truncated":
        file.write_bytes(content[: len(content) // 2])
    elif kind == "gone":
        file.unlink()
    elif kind == "card gone":
        (directory / "card.json").unlink()
    elif kind == "card":
        (directory / "card.json").write_text('{"splits": ')
    elif kind == "card of another kind":
        (directory / "card.json").write_text("[]")
    elif kind == "info":
        info = directory / "dataset_info.json"
        info.write_text("{" * info.stat().st_size)
    elif kind == "flipped":
        place = next(place for place in range(100, len(content)) if all(content[place : place + 8]))
        flipped = bytes(255 - value for value in content[place : place + 8])
        file.write_bytes(content[:place] + flipped + content[place + 8 :])
    elif kind == "no example":
        size = len(content)
        writer = ArrayRecordWriter(str(file), "group_size:1")
        for _ in TEXTS:
            writer.write(b"\xff" * 7)
        writer.close()
        card = directory / "card.json"
        card.write_text(card.read_text().replace(f": {size}", f": {file.stat().st_size}"))


KINDS = ["truncated", "gone", "card gone", "card", "card of another kind", "info", "flipped", "no example"]


@pytest.mark.parametrize("kind", KINDS)
def test_damage_is_a_fault_in_one_line(tmp_path, kind):
    directory = tmp_path / "text"
    write_text(directory, TEXTS, CARD)
    damage(directory, kind)
    with pytest.raises(Fault, match=r"damaged|no finished data set") as caught:
        list(read_text(directory))
    assert "\n" not in str(caught.value)
    assert str(directory) in str(caught.value)


def test_a_split_without_documents_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"'text of a@0' has no document for split 'train'"):
        write_text(tmp_path / "text", [], CARD)
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_the_source_arrives_as_it_was_and_leaves_nothing(tmp_path):
    def texts():
        yield "one"
        raise UserError("file x, line 7: no field 'text'")

    with pytest.raises(UserError, match=r"^file x, line 7: no field 'text'$"):
        write_splits(tmp_path / "text", {"train": texts}, CARD)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_a_fault(tmp_path):
    def texts():
        yield "one"
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(Fault, match=r"cannot write data set .*: No space left on device$"):
        write_splits(tmp_path / "text", {"train": texts}, CARD)
    assert list(tmp_path.iterdir()) == []


def test_a_limit_of_the_file_system_is_a_fault_and_leaves_nothing(tmp_path):
    done = run(
        f"""
import os
from pathlib import Path
from epigone.data.datasets import write_text
from epigone.errors import Fault
try:
    write_text(Path({str(tmp_path)!r}) / "text", [os.urandom(500).hex() for _ in range(3000)], {{"name": "x"}})
except Fault as fault:
    print(fault)
""",
        preexec_fn=small_files_only,
    )
    assert done.stdout.startswith(f"cannot write data set {tmp_path / 'text'}: "), done.stderr
    assert done.stdout.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def small_files_only():
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))


def test_killed_half_way_nothing_looks_finished_and_the_next_call_cleans_up(tmp_path):
    done = run(
        f"""
import os, signal
from pathlib import Path
from epigone.data.datasets import write_splits
def texts():
    for index in range(5000):
        yield f"text {{index}}"
    os.kill(os.getpid(), signal.SIGKILL)
write_splits(Path({str(tmp_path)!r}) / "text", {{"train": lambda: ["first"], "test": texts}}, {{"name": "x"}})
"""
    )
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "text").exists()
    assert len(list(tmp_path.iterdir())) == 1
    with pytest.raises(Fault, match="no finished data set"):
        open_splits(tmp_path / "text")
    write_text(tmp_path / "text", TEXTS, CARD)
    assert [path.name for path in tmp_path.iterdir()] == ["text"]


def test_of_two_writers_the_first_to_finish_wins(tmp_path):
    first = run(
        f"""
from pathlib import Path
from epigone.data.datasets import write_text
def texts():
    yield "mine"
    import subprocess, sys
    code = "import sys; sys.path[:0] = " + repr(sys.path) + '''
from pathlib import Path
from epigone.data.datasets import write_text
write_text(Path({str(tmp_path)!r}) / "text", ["theirs"], {{"name": "x"}})
'''
    subprocess.run([sys.executable, "-c", code], check=True)
print(list(write_text(Path({str(tmp_path)!r}) / "text", texts(), {{"name": "x"}})))
"""
    )
    assert first.stdout == "['theirs']\n", first.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["text"]


def test_nothing_is_printed(tmp_path, capfd):
    write_text(tmp_path / "text", TEXTS, CARD)
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""


def test_the_card_is_plain_json(tmp_path):
    write_text(tmp_path / "text", TEXTS, CARD)
    stored = json.loads((tmp_path / "text" / "card.json").read_text())
    assert stored["splits"]["train"]["parents"] == CARD["parents"]
    assert set(stored["files"]) == {path.name for path in (tmp_path / "text").iterdir()} - {"card.json"}
