"""Documents on disk: TFDS data sets in ArrayRecord format, written and read without TensorFlow, each with a card."""

import hashlib
import itertools
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np

from epigone.errors import Fault, UserError
from epigone.storage.folders import fetched, writing

CARD = "card.json"
_BLOCK = 4096
"""Documents read at once when all are wanted: one call each would cost four times as much."""

_NAME = "epigone_text"
_SHARD_BYTES = 2**30
"""Bytes of records after which a split goes on in another file."""


class Documents(Sequence[str]):
    """Texts with random access, and the card that says what they are."""

    def __init__(self, source: Any, card: dict[str, Any], directory: Path, field: str = "text"):
        self._source, self._field, self._directory = source, field, directory
        self.card = card

    def __len__(self) -> int:
        return len(self._source)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        """Document(s) by position. Raises Fault if the file under it is damaged."""
        if isinstance(index, slice):
            return self._read(range(len(self))[index])
        return self._read([range(len(self))[index]])[0]

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), _BLOCK):
            yield from self[start : start + _BLOCK]

    def tokens(self) -> list[np.ndarray]:
        """The ids, int32, that the writer of the text chose. Raises UserError if the data set stores text alone."""
        starts = range(0, len(self), _BLOCK)
        rows = (row for start in starts for row in self._rows(range(len(self))[start : start + _BLOCK]))
        try:
            return [np.asarray(row["tokens"], np.int32) for row in rows]
        except KeyError as error:
            raise UserError(f"data set {self._directory} stores text without token ids: encode it") from error

    def _read(self, indices: Sequence[int]) -> list[str]:
        try:
            values = [row[self._field] for row in self._rows(indices)]
            # TFDS gives Text back as bytes, and its mocked data as str.
            return [value if isinstance(value, str) else bytes(value).decode() for value in values]
        except UnicodeDecodeError as error:
            raise Fault(f"data set {self._directory}: field '{self._field}' is not UTF-8 ({error.reason})") from error

    def _rows(self, indices: Sequence[int]) -> Sequence[Mapping[str, Any]]:
        try:
            return self._source.__getitems__(list(indices))
        except (OSError, RuntimeError, ValueError, IndexError) as error:
            raise _damaged(self._directory, error) from error


def write_text(
    directory: Path,
    documents: Iterable[str],
    card: Mapping[str, Any],
    tokens: Sequence[np.ndarray] | None = None,
) -> Documents:
    """Store texts (what a model wrote, say) as a TFDS data set with one split, and say on its card where they are from.

    Args:
        directory: becomes the data set; it appears whole or not at all.
        documents: the texts, in the order in which they will be read.
        card: what only the writer knows: `parents` ([{"key", "identity"}]), `sampling`, ... Counts and the hash of
            the content are added.
        tokens: the ids of each document without specials, stored beside the text, so that a generation learns the very
            tokens that were written even where text does not encode back to them. The card counts them with their eos.
    """
    counts = {} if tokens is None else {"tokens": sum(len(ids) + 1 for ids in tokens)}
    write_splits(directory, {"train": lambda: documents}, {**card, **counts}, tokens)
    return read_text(directory)


def read_text(directory: Path) -> Documents:
    """Open what `write_text` wrote. Raises Fault if it is missing or damaged."""
    return open_splits(directory)["train"]


def write_splits(
    directory: Path,
    splits: Mapping[str, Callable[[], Iterable[str]]],
    card: Mapping[str, Any],
    tokens: Sequence[np.ndarray] | None = None,
) -> None:
    """Write `directory` as a TFDS data set. A split is a function, called once, that gives the documents in order.

    A killed call leaves only a hidden partial folder, which the next one on the same machine removes. Of two calls at
    once the first to finish wins. Raises UserError if a split has no document, Fault if the disk is full.
    """
    with writing(directory) as local:
        _write_splits(local, splits, card, tokens)


def _write_splits(
    directory: Path,
    splits: Mapping[str, Callable[[], Iterable[str]]],
    card: Mapping[str, Any],
    tokens: Sequence[np.ndarray] | None,
) -> None:
    partial = directory.parent / f".{directory.name}.{socket.gethostname()}-{os.getpid()}.partial"
    counted = {split: _Counted(split, texts, card) for split, texts in splits.items()}
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(directory)
        _build(partial, counted, tokens)
        cards = {split: {**card, **counts.card()} for split, counts in counted.items()}
        content = json.dumps({"splits": cards, "files": _file_sizes(partial)}, indent=1, ensure_ascii=False)
        (partial / CARD).write_text(content, encoding="utf-8")
        _publish(partial, directory)
    except (UserError, Fault):
        raise
    except Exception as error:  # TFDS and ArrayRecord wrap what went wrong in errors of many types
        raise _cause(error, directory) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def open_splits(directory: Path) -> dict[str, Documents]:
    """Open what `write_splits` wrote; of what lies in a bucket a copy on this disk.

    Raises Fault if it is missing or damaged (a file of another size, a bad card).
    """
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.decode import DeserializeMethod

    directory = fetched(directory)
    try:
        stored = json.loads((directory / CARD).read_text(encoding="utf-8"))
        expected, cards = stored["files"], stored["splits"]
    except FileNotFoundError as error:
        raise Fault(f"no finished data set at {directory}") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(directory, error) from error
    found = _file_sizes(directory)
    for name, size in expected.items():
        if found.get(name) != size:
            state = "is missing" if name not in found else f"has {found[name]} bytes instead of {size}"
            raise Fault(f"data set {directory} is damaged: {name} {state}: delete the folder to build it again")
    try:
        builder = tfds.builder_from_directory(directory)
        raw = DeserializeMethod.RAW_BYTES
        sources = {split: builder.as_data_source(split=split, deserialize_method=raw) for split in cards}
        return {split: Documents(_Records(source), cards[split], directory) for split, source in sources.items()}
    except Exception as error:  # protobuf, etils and TFDS each raise their own
        raise _damaged(directory, error) from error


def describe(texts: Iterable[str]) -> dict[str, Any]:
    """Counts and content hash of texts: {documents, bytes, words, sha256}."""
    counted = _Counted("", lambda: texts, {})
    for _ in counted:
        pass
    return counted.counts()


class _Counted:
    """Passes documents on and counts them, so that the card is made in the one pass that writes them."""

    def __init__(self, split: str, texts: Callable[[], Iterable[str]], card: Mapping[str, Any]):
        self._split, self._texts, self._name = split, texts, card.get("name", "text")
        self._documents = self._bytes = self._words = 0
        self._hash = hashlib.sha256()

    def __iter__(self) -> Iterator[str]:
        for text in self._texts():
            encoded = text.encode()
            self._documents += 1
            self._bytes += len(encoded)
            self._words += len(text.split())
            # The length keeps ["ab"] and ["a", "b"] apart.
            self._hash.update(b"%d:" % len(encoded) + encoded)
            yield text
        if not self._documents and self._split:
            raise UserError(f"'{self._name}' has no document for split '{self._split}': give more text")

    def counts(self) -> dict[str, Any]:
        sizes = {"documents": self._documents, "bytes": self._bytes, "words": self._words}
        return {**sizes, "sha256": self._hash.hexdigest()}

    def card(self) -> dict[str, Any]:
        return {"split": self._split, **self.counts()}


def _build(partial: Path, splits: Mapping[str, Iterable[str]], tokens: Sequence[np.ndarray] | None) -> None:
    """Files of records, and what TFDS wants to know of files that it has not written itself.

    Its own builder takes twice as long, most of it checks of a shape that is known here.
    """
    import tensorflow_datasets as tfds

    features = {"text": tfds.features.Text()}
    if tokens is not None:
        features["tokens"] = tfds.features.Tensor(shape=(None,), dtype=np.int32)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    infos = []
    for split, texts in splits.items():
        shards = _write_shards(partial, split, _records(texts, tokens))
        template = tfds.core.ShardedFileTemplate(
            data_dir=partial, dataset_name=_NAME, split=split, filetype_suffix="array_record"
        )
        for index, shard in enumerate(shards):
            shard.path.rename(template.sharded_filepath(shard_index=index, num_shards=len(shards)))
        lengths, size = [shard.records for shard in shards], sum(shard.size for shard in shards)
        infos.append(tfds.core.SplitInfo(name=split, shard_lengths=lengths, num_bytes=size, filename_template=template))
    # Without shuffling the documents keep their order: reading is sequential, and a chapter's verses adjoin.
    tfds.folder_dataset.write_metadata(
        data_dir=partial, features=features, split_infos=infos, check_data=False, disable_shuffling=True
    )


def _records(texts: Iterable[str], tokens: Sequence[np.ndarray] | None) -> Iterator[bytes]:
    """Each document as a serialised tf.train.Example."""
    from tensorflow_datasets.proto import tf_example_pb2, tf_feature_pb2

    rows: Iterable[tuple[str, np.ndarray | None]]
    rows = ((text, None) for text in texts) if tokens is None else zip(texts, tokens, strict=True)
    for text, ids in rows:
        features = {"text": tf_feature_pb2.Feature(bytes_list=tf_feature_pb2.BytesList(value=[text.encode()]))}
        if ids is not None:
            values = tf_feature_pb2.Int64List(value=np.asarray(ids, np.int32).tolist())
            features["tokens"] = tf_feature_pb2.Feature(int64_list=values)
        example = tf_example_pb2.Example(features=tf_feature_pb2.Features(feature=features))
        yield example.SerializeToString(deterministic=True)


class _Shard(NamedTuple):
    """A file of records that is written."""

    path: Path
    records: int
    size: int


def _write_shards(directory: Path, split: str, records: Iterable[bytes]) -> list[_Shard]:
    """Write records to files of about `_SHARD_BYTES`, named by their number."""
    from array_record.python.array_record_module import ArrayRecordWriter

    shards: list[_Shard] = []
    rest = iter(records)
    for first in rest:
        path, count, size = directory / f"{split}-{len(shards)}", 0, 0
        writer = ArrayRecordWriter(str(path), "group_size:1")
        try:
            for record in itertools.chain([first], rest):
                writer.write(record)
                count, size = count + 1, size + len(record)
                if size >= _SHARD_BYTES:
                    break
        finally:
            writer.close()
        shards.append(_Shard(path, count, size))
    return shards


class _Records:
    """Records that `_records` made, parsed; TFDS' decoders, which do for any features, take several times as long."""

    def __init__(self, records: Any):
        self._records = records

    def __len__(self) -> int:
        return len(self._records)

    def __getitems__(self, indices: Sequence[int]) -> list[Mapping[str, Any]]:
        return [_parsed(record) for record in self._records.__getitems__(indices)]


def _parsed(record: bytes) -> Mapping[str, Any]:
    from google.protobuf.message import DecodeError
    from tensorflow_datasets.proto import tf_example_pb2

    try:
        features = tf_example_pb2.Example.FromString(record).features.feature
    except DecodeError as error:
        raise ValueError(f"a record of {len(record)} bytes is no example") from error
    row: dict[str, Any] = {"text": features["text"].bytes_list.value[0]}
    if "tokens" in features:
        row["tokens"] = list(features["tokens"].int64_list.value)
    return row


def _publish(built: Path, directory: Path) -> None:
    try:
        built.replace(directory)
    except OSError:
        # Another process published the same data set first; its copy is as good.
        if not (directory / CARD).exists():
            raise


def _remove_stale(directory: Path) -> None:
    prefix = f".{directory.name}.{socket.gethostname()}-"
    for path in directory.parent.iterdir():
        process = path.name.removeprefix(prefix).removesuffix(".partial")
        if path.name == f"{prefix}{process}.partial" and process.isdigit() and not _alive(int(process)):
            shutil.rmtree(path, ignore_errors=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _file_sizes(directory: Path) -> dict[str, int]:
    files = directory.iterdir() if directory.is_dir() else []
    return {path.name: path.stat().st_size for path in sorted(files) if path.is_file() and path.name != CARD}


def _cause(error: BaseException, directory: Path) -> Exception:
    """The error of ours, or the operating system's, under what TFDS made of it."""
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, UserError | Fault):
            return link
        if isinstance(link, OSError) and link.strerror:
            return Fault(f"cannot write data set {directory}: {link.strerror}")
        link = link.__cause__ or link.__context__
    return Fault(f"cannot write data set {directory}: {_first_line(error)}")


def _damaged(directory: Path, error: BaseException) -> Fault:
    return Fault(f"data set {directory} is damaged ({_first_line(error)}): delete the folder to build it again")


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
