"""A teacher whose scores were kept on disk: it is asked once, and need not be in memory when its students learn."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import ml_dtypes  # noqa: F401  (gives numpy the type bfloat16)
import numpy as np

from epigone.data.pipeline import Batch
from epigone.errors import Fault, UserError
from epigone.lessons.heads import Head, Hidden
from epigone.lessons.sparse import Rest, Sparse
from epigone.lessons.terms import FLOOR
from epigone.teachers import Signal
from epigone.teachers.kept import HiddenStates, Kept, Scores
from epigone.teachers.score_files import ScoreFiles, segments
from epigone.teachers.score_records import decode, encode


@dataclass(frozen=True)
class FetchedScores:
    """A few scores a token, as they were read."""

    kind: Rest

    def __call__(self, params: Any, batch: Batch, fetched: dict[str, jax.Array]) -> Sparse:
        return Sparse(fetched["ids_BTM"], fetched["log_probs_BTM"], fetched["rest_BT"], self.kind)


def fetched_states(params: Any, batch: Batch, fetched: dict[str, jax.Array]) -> Hidden:
    """Hidden states, as they were read, and the teacher's head."""
    return Hidden(fetched["hidden_BTD"], params["head_VD"])


class CachedTeacher:
    """What was kept of a teacher's scores, found by the content of each segment.

    Attributes:
        kept: what is kept of a token.
        temperature: by which the logits were divided.
        files: where it is.
    """

    def __init__(
        self,
        kept: Scores | HiddenStates,
        directory: Path,
        *,
        vocab_size: int,
        temperature: float = 1.0,
        tokenizer_identity: str = "",
        tokenizer_name: str = "unnamed",
        tokens: int | None = None,
        head: Head | None = None,
        head_VD: Any = None,
    ) -> None:
        self.kept, self.temperature, self.files = kept, temperature, ScoreFiles(directory)
        self.vocab_size, self.tokens = vocab_size, tokens
        self.tokenizer_identity, self.tokenizer_name = tokenizer_identity, tokenizer_name
        # Of a few scores it says which ids they are of, so that a student with more rows leaves those out.
        self.head, self._head_VD = head or Head(vocab_size), head_VD
        states = isinstance(kept, HiddenStates)
        self.signal = Signal.HIDDEN_STATES if states else Signal.SPARSE_SCORES
        self.scores: Any = fetched_states if states else FetchedScores(Rest(kept.rest))  # type: ignore[union-attr]

    def place(self) -> Any:
        """The teacher's head where hidden states were kept, else nothing."""
        return {} if self._head_VD is None else {"head_VD": self._head_VD}

    def fetch(self, batch: Batch) -> dict[str, Any]:
        """What was kept of every position [B, T, ...]. Raises UserError for a text that was not scored."""
        B, T = batch.tokens_BT.shape
        found = segments(np.asarray(batch.tokens_BT), np.asarray(batch.segments_BT))
        try:
            records = self.files.read([segment.key for segment in found])
        except KeyError:
            raise UserError(f"{self.files.directory} has no scores of this text: run 'epigone label' first") from None
        arrays = self._empty(B, T)
        try:
            for segment, record in zip(found, records, strict=True):
                place = (segment.row, slice(segment.first, segment.first + segment.length))
                for array, part in zip(arrays.values(), self._decoded(segment.length, record), strict=True):
                    array[place] = part
        except Fault as error:
            raise Fault(f"scores {self.files.directory} are damaged ({error}): delete the folder") from error
        return arrays

    def record(self, kept: Kept | np.ndarray) -> bytes:
        """What was kept of one segment, as bytes."""
        if isinstance(self.kept, HiddenStates):
            return np.ascontiguousarray(kept).tobytes()
        return encode(self.kept, self.vocab_size, kept)  # type: ignore[arg-type]

    def flops_per_token(self, length: int) -> int:
        """None: they were spent when it was asked."""
        return 0

    def _empty(self, B: int, T: int) -> dict[str, np.ndarray]:
        if isinstance(self.kept, HiddenStates):
            return {"hidden_BTD": np.zeros((B, T, self._head_VD.shape[1]), np.dtype(self.kept.dtype))}
        M = self.kept.entries(self.vocab_size)
        return {
            "ids_BTM": np.zeros((B, T, M), np.int32),
            "log_probs_BTM": np.full((B, T, M), FLOOR, np.float32),
            "rest_BT": np.zeros((B, T), np.float32),
        }

    def _decoded(self, tokens: int, record: bytes) -> tuple[np.ndarray, ...]:
        if isinstance(self.kept, HiddenStates):
            return (np.frombuffer(record, np.dtype(self.kept.dtype)).reshape(tokens, -1),)
        return decode(self.kept, self.vocab_size, tokens, record)
