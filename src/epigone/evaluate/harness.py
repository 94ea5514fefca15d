"""Any model of Epigone as a model of lm-evaluation-harness: the three methods that its tasks are made of.

Contexts and continuations become tokens as the harness' own Hugging Face model makes them, except that bos is always
read first, since every model here was taught so. A text beyond the model's longest length is scored in the harness' own
rolling windows, so that figures compare with those that others print.

Only this file imports `lm_eval`.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np
from lm_eval.api.model import LM
from tqdm import tqdm

from epigone.errors import UserError
from epigone.evaluate.continuations import Piece, Score, Scored, pieces_of, scores_by_asking
from epigone.models.language_model import Document, LanguageModel

PIECES = 512
"""Pieces that are scored between two looks at the progress."""

PROMPTS = 64
"""Prompts that are continued side by side."""

NEW_TOKENS = 256
"""Tokens of an answer where a task names no number, as in the harness; at most half of what the model can read."""


class Tokens(Protocol):
    """The part of a tokenizer that tasks need."""

    @property
    def identity(self) -> str: ...

    def encode(self, text: str) -> Document: ...

    def decode(self, ids: Document) -> str: ...


class HarnessModel(LM):
    """What `lm_eval.simple_evaluate(model=...)` takes.

    Args:
        model: any language model.
        tokenizer: its tokenizer; with `chat` one that has `render_chat` and reads special tokens.
        score: how pieces are scored; by default by asking the model token by token, which is right for every model
            that reads texts of any length. A decoder has a quicker way: `sampling.greedy.continuation_scores`.
        max_length: inputs that the model can read at once, bos included; None: any number.
        seed: of answers that a task wants sampled.
        chat: the harness puts prompts into the tokenizer's chat template, so special tokens in a prompt are read.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokens,
        *,
        score: Score | None = None,
        max_length: int | None = None,
        seed: int = 0,
        chat: bool = False,
    ) -> None:
        super().__init__()
        self.model, self.max_length, self.seed, self.chat = model, max_length, seed, chat
        self.score: Score = score or partial(scores_by_asking, model)
        self._tokenizer = tokenizer  # as `tokenizer` the harness would take it for one of Hugging Face's

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Log-probability of each continuation after its context, and whether greedy decoding would write it."""
        asked = [self._continuation(*request.args) for request in requests]
        return [(scored.log_prob, scored.greedy) for scored in self._scores(asked)]

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Log-probability of each text after bos; the end of the text is not scored."""
        asked = []
        for request in requests:
            ids = self._with_bos(request.args[0])
            asked.append(pieces_of(ids, len(ids) - 1, self.max_length))
        return [scored.log_prob for scored in self._scores(asked)]

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Each context continued up to a stop string, which is left out; greedy unless the task wants samples.

        Raises UserError for an answer that leaves the model no room to read, or a setting that is not known.
        """
        answers = [""] * len(requests)
        groups: dict[Answer, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(answer_of(request.args[1], self.max_length), []).append(index)
        with tqdm(total=len(requests), desc="answers", disable=None) as progress:
            for how, members in groups.items():
                for start in range(0, len(members), PROMPTS):
                    part = members[start : start + PROMPTS]
                    prompts = [self._prompt(requests[index].args[0], how.length) for index in part]
                    for index, text in zip(part, self._answers(prompts, how, part[0]), strict=True):
                        answers[index] = text
                    progress.update(len(part))
        return answers

    @property
    def tokenizer_name(self) -> str:
        """Tells cached requests of different tokenizers apart."""
        return self._tokenizer.identity

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The template, for the harness' records."""
        return getattr(self._tokenizer, "chat_template", None) or ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as the model was taught to read it. Raises UserError if its tokenizer has no template."""
        if not getattr(self._tokenizer, "chat_template", None):
            raise UserError("the node's tokenizer has no chat template: evaluate without --chat")
        return self._tokenizer.render_chat(chat_history, add_generation_prompt=add_generation_prompt)  # type: ignore

    def _encode(self, text: str) -> np.ndarray:
        return self._tokenizer.encode(text, specials=True) if self.chat else self._tokenizer.encode(text)  # type: ignore

    def _with_bos(self, text: str) -> np.ndarray:
        """bos and the tokens; a rendered chat may begin with bos by itself."""
        bos, ids = self.model.specials.bos, self._encode(text)
        return ids if self.chat and len(ids) and ids[0] == bos else np.r_[bos, ids].astype(np.int32)

    def _continuation(self, context: str, continuation: str) -> list[Piece]:
        """Spaces at the end of a context belong to the word that follows, so they go to the continuation.

        Raises UserError where nothing of the continuation is left to score: it would count as certain.
        """
        kept = context.rstrip()
        whole = self._with_bos(context + continuation)
        count = len(whole) - len(self._with_bos(kept))
        if count < 1:
            raise UserError(
                f"continuation {continuation!r} adds no token after {kept[-40:]!r}: the node's tokenizer drops it or "
                f"joins it to what stands before, so the task cannot be scored with it"
            )
        return pieces_of(whole, count, self.max_length)

    def _scores(self, asked: Sequence[list[Piece]]) -> list[Scored]:
        """Scores of texts that are one or several pieces; long pieces first, so that the time left is never too low."""
        pieces = [piece for one in asked for piece in one]
        order = sorted(range(len(pieces)), key=lambda index: -len(pieces[index].inputs_T))
        found: dict[int, Scored] = {}
        with tqdm(total=len(pieces), desc="scores", disable=None) as progress:
            for start in range(0, len(order), PIECES):
                part = order[start : start + PIECES]
                scores = self.score([pieces[index] for index in part])
                found |= {index: Scored(*score) for index, score in zip(part, scores, strict=True)}
                progress.update(len(part))
        parts = iter(range(len(pieces)))
        texts = [[found[next(parts)] for _ in one] for one in asked]
        return [Scored(float(sum(s.log_prob for s in text)), all(s.greedy for s in text)) for text in texts]

    def _prompt(self, context: str, length: int) -> Document:
        """Tokens without bos; of a long context the last ones that leave room for the answer."""
        ids = self._with_bos(context)[1:]
        room = len(ids) if self.max_length is None else self.max_length - 1 - length
        return ids[len(ids) - min(room, len(ids)) :]

    def _answers(self, prompts: list[Document], how: "Answer", first: int) -> list[str]:
        """The answers to prompts side by side; when each has met a stop string, nothing more is written."""
        knobs: dict[str, Any] = {"temperature": how.temperature, "top_k": how.top_k, "top_p": how.top_p}
        seed = (self.seed + first) % 2**31
        written: list[list[Document]] = [[] for _ in prompts]
        texts, going_on = [""] * len(prompts), set(range(len(prompts)))
        for prompt, _, tokens in self.model.stream(prompts, seed, length=how.length, **knobs):
            written[prompt].append(tokens)
            texts[prompt] = self._tokenizer.decode(np.concatenate(written[prompt]))
            if any(stop in texts[prompt] for stop in how.until):
                going_on.discard(prompt)
            if not going_on:
                break
        return [_cut(text, how.until) for text in texts]


class Answer(NamedTuple):
    """How a task wants its answers written."""

    until: tuple[str, ...]
    length: int
    temperature: float
    top_k: int
    top_p: float


_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_LIMITS: tuple[tuple[str, Any, Callable[[Any], Any]], ...] = (("top_k", 0, int), ("top_p", 1.0, float))
_KNOWN = {"until", "do_sample", "temperature", "top_k", "top_p", *_LENGTHS}


def answer_of(asked: dict[str, Any], max_length: int | None) -> Answer:
    """A task's `generation_kwargs`: greedy unless they ask for samples, by `do_sample` or a temperature above 0.

    Raises:
        UserError: a setting is unknown, or the answer would fill all that the model can read.
    """
    if unknown := sorted(set(asked) - _KNOWN):
        raise UserError(f"generation_kwargs {', '.join(unknown)}: not known here; known: {', '.join(sorted(_KNOWN))}")
    usual = NEW_TOKENS if max_length is None else max(1, min(NEW_TOKENS, max_length // 2))
    length = _number(next(((name, asked[name]) for name in _LENGTHS if asked.get(name) is not None), ("", usual)), int)
    if length < 1 or (max_length is not None and length >= max_length):
        limit = "" if max_length is None else f", below the model's max_length {max_length}"
        raise UserError(f"a task asks for answers of {length} tokens: set max_gen_toks to at least 1{limit}")
    until = asked.get("until") or ()
    until = [until] if isinstance(until, str) else until
    if not isinstance(until, list | tuple) or not all(isinstance(stop, str) for stop in until):
        raise UserError(f"generation_kwargs until={until!r}: a text or a list of texts is wanted")
    until = tuple(filter(None, until))
    temperature = asked.get("temperature")
    temperature = None if temperature is None else _number(("temperature", temperature), float)
    if temperature == 0 or not asked.get("do_sample", temperature is not None):
        return Answer(until, length, 0.0, 0, 1.0)
    top_k, top_p = (_number((name, asked.get(name) or off), kind) for name, off, kind in _LIMITS)
    return Answer(until, length, 1.0 if temperature is None else temperature, top_k, top_p)


def _number(named: tuple[str, Any], kind: Callable[[Any], Any]) -> Any:
    name, value = named
    try:
        return kind(value)
    except (TypeError, ValueError, OverflowError):
        raise UserError(f"generation_kwargs {name}={value!r}: a number is wanted") from None


def _cut(text: str, until: Sequence[str]) -> str:
    for stop in until:
        text = text.split(stop)[0]
    return text
