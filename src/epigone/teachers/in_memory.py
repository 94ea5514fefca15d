"""Teachers that live beside the student: a decoder in the same program, an n-gram model on the host."""

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax import nnx

from epigone.lessons.heads import Head, Hidden
from epigone.models import decoder
from epigone.models.config import DecoderConfig
from epigone.models.inside import Asked, Inside
from epigone.models.language_model import BOS
from epigone.models.ngram import NGramModel
from epigone.models.rules import Sharding
from epigone.models.sharding import spread
from epigone.teachers import Batch, Signal, Teacher


@dataclass(frozen=True)
class DecoderStates:
    """Forward pass of a decoder up to its head: config and rules on the mesh are all that the step depends on."""

    config: DecoderConfig
    sharding: Sharding = Sharding()

    def __call__(self, params: Any, batch: Batch, fetched: Any = None) -> Hidden:
        return self.look_inside(params, batch, Asked())[0]

    def look_inside(self, params: Any, batch: Batch, asked: Asked) -> tuple[Hidden, Inside]:
        """The same, and what is asked for of single layers."""
        return look_inside(nnx.merge(decoder.structure(self.config, self.sharding), params), batch, asked)

    @property
    def head(self) -> Head:
        """How its hidden states become logits."""
        config = self.config
        return Head(config.vocab_size, soft_cap=config.logit_softcap, never=config.specials.never)


def look_inside(model: decoder.Decoder, batch: Batch, asked: Asked) -> tuple[Hidden, Inside]:
    """What a decoder makes of a batch, up to its head, and what is asked for of single layers; traced."""
    hidden_BTD, inside = model.look_inside(batch.tokens_BT, batch.positions_BT, batch.segments_BT, asked)
    return Hidden(hidden_BTD, model.head_VD), inside


def config_inside(teacher: Teacher | None) -> DecoderConfig | None:
    """What a teacher is whose layers can be looked into: one decoder with weights of its own; None of any other."""
    scores: Any = getattr(teacher, "scores", None)
    return scores.config if type(scores) is DecoderStates else None


class DecoderTeacher:
    """A decoder that reads each batch within the student's step, on the same mesh.

    Args:
        config: the decoder's, its vocab_size filled in.
        params: its weights, or a function from their shapes and places to them, such as one that reads them from a
            disk: then nobody ever holds all of them.
        tokenizer_identity: of the tokens that it reads.
        tokenizer_name: for messages.
        tokens: how many there are; None for vocab_size.
        sharding: its rules on the mesh.
    """

    signal = Signal.HIDDEN_STATES

    def __init__(
        self,
        config: DecoderConfig,
        params: Any,
        tokenizer_identity: str,
        tokenizer_name: str = "unnamed",
        tokens: int | None = None,
        sharding: Sharding = Sharding(),
    ) -> None:
        self.params = params
        self.vocab_size, self.tokens = config.vocab_size, tokens
        self.tokenizer_identity, self.tokenizer_name = tokenizer_identity, tokenizer_name
        self.scores = DecoderStates(config, sharding)
        self.head = self.scores.head

    def place(self) -> Any:
        """The parameters, cut over the mesh that is set by the teacher's own rules."""
        abstract = decoder.abstract(self.scores.config, self.scores.sharding)
        if callable(self.params):
            return self.params(abstract)
        return spread(self.params, jax.tree.map(lambda leaf: leaf.sharding, abstract))

    def head_alone(self) -> dict[str, Any]:
        """Its head, for a lesson that keeps its hidden states."""
        config = self.scores.config
        params = self.params(decoder.abstract(config)) if callable(self.params) else self.params
        return {"head": self.head, "head_VD": nnx.merge(decoder.structure(config), params).head_VD}

    def fetch(self, batch: Batch) -> dict[str, Any]:
        """Nothing: all is in the step."""
        return {}

    def flops_per_token(self, length: int) -> int:
        """Those of a forward pass."""
        return decoder.flops_per_token(self.scores.config, length, training=False)


def fetched_logits(params: Any, batch: Batch, fetched: dict[str, jax.Array]) -> jax.Array:
    """The scores that were fetched on the host, as they are."""
    return fetched["logits_BTV"]


class NGramTeacher:
    """A count-based model that is looked up on the host, one row of scores for each different context of a batch.

    A context ends at its own segment: the piece of a long document that goes on in a new row is read as if it began
    there, so its first `order - 2` tokens are scored with less context.
    """

    signal = Signal.DENSE_LOGITS
    scores = staticmethod(fetched_logits)
    head = None

    def __init__(self, model: NGramModel, tokenizer_identity: str, tokenizer_name: str = "unnamed") -> None:
        self.model = model
        self.vocab_size = self.tokens = model.vocab_size
        self.tokenizer_identity, self.tokenizer_name = tokenizer_identity, tokenizer_name

    def place(self) -> Any:
        """Nothing: counts stay on the host."""
        return {}

    def fetch(self, batch: Batch) -> dict[str, Any]:
        """Natural-log probabilities of the next token, [B, T, V] float32, -inf where the model gives none."""
        width = max(self.model.order - 1, 1)
        windows = context_windows(np.asarray(batch.tokens_BT), np.asarray(batch.segments_BT), width)
        contexts, rows = np.unique(windows.reshape(-1, width), axis=0, return_inverse=True)
        log_probs = self.model.next_log_probs([context[context >= 0] for context in contexts]).astype(np.float32)
        return {"logits_BTV": log_probs[rows].reshape(*windows.shape[:2], self.vocab_size)}

    def flops_per_token(self, length: int) -> int:
        """None that count: it looks up."""
        return 0


def context_windows(tokens_BT: np.ndarray, segments_BT: np.ndarray, width: int) -> np.ndarray:
    """The last `width` tokens of each position's own segment, itself included: [B, T, width].

    -1 stands for what is before the segment, and for bos, which every model puts before a context by itself.
    """
    windows = np.full((*tokens_BT.shape, width), -1, tokens_BT.dtype)
    T = tokens_BT.shape[1]
    for back in range(min(width, T)):
        same = segments_BT[:, back:] == segments_BT[:, : T - back]
        known = same & (tokens_BT[:, : T - back] != BOS)
        windows[:, back:, width - 1 - back] = np.where(known, tokens_BT[:, : T - back], -1)
    return windows
