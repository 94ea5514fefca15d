"""`epigone sample NODE`: texts of a node that is grown or imported, shown while they are written."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tyro

from epigone.cli import Place
from epigone.data.tokenizers import Tokenizer
from epigone.errors import UserError
from epigone.models.language_model import Document, LanguageModel
from epigone.opened import OpenedNode, on_mesh, open_node
from epigone.training.config import Hardware


@dataclass(frozen=True)
class Sample:
    """Let a node write. One text is shown as it is written; of several, each on a line of its own.

    Attributes:
        node: the node: KEY as in teacher@0 or student@1.s2, NAME where one node has it, or RUN/KEY.
        run: the run directory; by default the one below runs/ that has the node.
        prompt: what the text begins with; give it again for more prompts.
        chat: put each prompt to the node as a user's message, in its own chat template, and show the answers alone.
        n: texts for each prompt.
        temperature: divides the logits before sampling; 0 takes the most probable token every time.
        top_k: sample among the k most probable tokens only; 0 is off.
        top_p: sample in the smallest set that holds this probability; 1 is off.
        max_length: tokens after which a text is cut.
        seed: another seed, another text.
        scores: show the log-probability of each text: nats per shown token, its end included if the model ended it.
        draft: a node that proposes tokens, which the node then reads at once (speculative decoding). The texts have the
            same distribution; at temperature 0 they are the same texts.
        hardware: the mesh over which the weights and the cache are cut.
    """

    node: tyro.conf.Positional[str]
    run: Place | None = None
    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    chat: bool = False
    n: int = 4
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    max_length: int = 128
    seed: int = 0
    scores: bool = False
    draft: str | None = None
    hardware: Hardware = field(default_factory=Hardware)


def pieces(given: Sample) -> Iterator[str]:
    """The texts, prompt first, in pieces to be printed one after the other.

    Raises UserError for a node or run that is not there, and for a prompt that the model cannot read.
    """
    _check(given)
    opened = open_node(given.node, given.run)
    with on_mesh(given.hardware):
        yield from _pieces(opened, given)


def _pieces(opened: OpenedNode, given: Sample) -> Iterator[str]:
    tokenizer = opened.tokenizer
    prompts = [_read(tokenizer, text, given.chat) for text in given.prompt or ("",)]
    shown = _Shown(tokenizer, prompts, given)
    write = _written if given.draft is None else _drafted
    for prompt, sample, tokens in write(opened, prompts, given):
        yield from shown.add(prompt, sample, tokens)
    yield from shown.rest(opened.model)


def _written(opened: OpenedNode, prompts: list[Document], given: Sample) -> Iterator[tuple[int, int, Document]]:
    """What the node writes, while it writes: index of the prompt, index of the sample, new tokens."""
    knobs: dict[str, Any] = {"temperature": given.temperature, "top_k": given.top_k, "top_p": given.top_p}
    yield from opened.model.stream(prompts, given.seed, samples=given.n, length=given.max_length, **knobs)


def _drafted(opened: OpenedNode, prompts: list[Document], given: Sample) -> Iterator[tuple[int, int, Document]]:
    """The texts that the node writes with a draft, whole; then standard error tells what the draft was good for."""
    from epigone.sampling.speculative import speculative_sample

    pair = [(model.config, model.params) for model in _pair(opened, given)]
    knobs: dict[str, Any] = {"temperature": given.temperature, "top_k": given.top_k, "top_p": given.top_p}
    sizes: dict[str, Any] = {"samples": given.n, "length": given.max_length}
    found, report = speculative_sample(pair[0], pair[1], prompts, given.seed, **sizes, **knobs)
    specials = opened.tokenizer.specials
    for i, row in enumerate(found):
        for j, (tokens, _) in enumerate(row):
            yield i, j, tokens[:-1] if len(tokens) and int(tokens[-1]) in (specials.eos, *specials.stops) else tokens
    accepted = f"{report.accepted} of {report.proposed} proposals accepted ({report.acceptance_rate:.0%})"
    sys.stdout.flush()
    print(f"draft {given.draft}: {accepted}, {report.tokens_per_pass:.2f} tokens a pass", file=sys.stderr, flush=True)


def _pair(opened: OpenedNode, given: Sample) -> tuple[Any, Any]:
    """The node's model and the draft's. Raises UserError unless both are decoders that read one tokenizer."""
    from epigone.models.config import DecoderConfig

    reference = str(given.draft)
    draft = open_node(reference, None if "/" in reference else opened.run)
    for one in (opened, draft):
        if not isinstance(one.node.model, DecoderConfig):
            raise UserError(f"'{one.node.key}' counts words: with --draft both nodes must be decoders")
    ours, theirs = opened.tokenizer, draft.tokenizer
    if ours.identity != theirs.identity:
        raise UserError(
            f"'{opened.node.key}' reads tokenizer {ours.name} ({ours.identity}), its draft '{draft.node.key}' "
            f"{theirs.name} ({theirs.identity}): take a draft with the same tokenizer"
        )
    return opened.model, draft.model


class _Shown:
    """Texts that grow side by side: the first one is shown at once, the others in their order at the end."""

    def __init__(self, tokenizer: Tokenizer, prompts: list[Document], given: Sample) -> None:
        self.tokenizer, self.prompts, self.given = tokenizer, prompts, given
        self.one_line = len(prompts) * given.n > 1
        self.texts: dict[tuple[int, int], Document] = {}
        self.decoder = tokenizer.stream_decoder()
        self.begun = False

    def add(self, prompt: int, sample: int, tokens: Document) -> Iterator[str]:
        """What can be shown of the first text, when it has grown."""
        before = self.texts.get((prompt, sample), tokens[:0])
        self.texts[prompt, sample] = np.concatenate([before, tokens])  # one array a text: a million of them fit
        if (prompt, sample) == (0, 0) and not self.given.scores:
            if not self.begun:
                yield self._line(self.decoder.add(self._head(0)))
            self.begun = True
            yield self._line(self.decoder.add(tokens))

    def rest(self, model: LanguageModel) -> Iterator[str]:
        """The end of the first text, and the others whole; each is forgotten when it is shown."""
        if self.begun:
            yield self._line(self.decoder.end()) + "\n"
        for i in range(len(self.prompts)):
            for j in range(self.given.n):
                tokens = self.texts.pop((i, j), self.prompts[i][:0])
                if self.begun and (i, j) == (0, 0):
                    continue
                whole = np.concatenate([self._head(i), tokens]).astype(np.int32)
                yield self._score(model, i, tokens) + self._line(self.tokenizer.decode(whole)) + "\n"

    def _head(self, prompt: int) -> Document:
        """What is shown before an answer: in a chat nothing, else the prompt."""
        return self.prompts[prompt][:0] if self.given.chat else self.prompts[prompt]

    def _score(self, model: LanguageModel, prompt: int, tokens: Document) -> str:
        """Mean log-probability of what is shown, given all that stands before; of the end, where there is one."""
        if not self.given.scores:
            return ""
        read = self.prompts[prompt]
        whole = np.concatenate([read, tokens]).astype(np.int32)
        (scores,) = model.log_probs([whole])
        shown = scores[len(read) - len(self._head(prompt)) : len(whole)].astype(np.float64)
        if len(tokens) < _limit(model, read, self.given.max_length):
            shown = np.append(shown, _end(model, whole, scores))
        return f"{shown.mean():7.3f}  "

    def _line(self, text: str) -> str:
        return " ".join(text.split("\n")) if self.one_line else text


def _limit(model: LanguageModel, prompt: Document, length: int) -> int:
    """Tokens after which a text is cut: a decoder also stops where its max_length is full."""
    config = getattr(model, "config", None)
    return length if config is None else min(length, config.max_length - len(prompt))


def _end(model: LanguageModel, document: Document, scores: np.ndarray) -> float:
    """Log-probability that the text ends after the document, by eos or by any other id that stops it."""
    specials = model.specials
    if not specials.stops:
        return float(scores[-1])
    (next_V,) = model.next_log_probs([document])
    return float(np.logaddexp.reduce(next_V[sorted({specials.eos, *specials.stops})].astype(np.float64)))


def _check(given: Sample) -> None:
    if given.n < 1 or given.max_length < 1:
        raise UserError(f"n={given.n}, max_length={given.max_length}: both must be at least 1")
    if not 0 <= given.seed < 2**31:
        raise UserError(f"seed={given.seed}: from 0 to {2**31 - 1}")
    if 0 < given.temperature < 1e-6:
        raise UserError(f"temperature={given.temperature}: 0 takes the most probable token; above it, at least 1e-6")
    if given.temperature < 0:
        raise UserError(f"temperature={given.temperature} is negative: 0 takes the most probable token, 1 samples")
    if any(not text.isprintable() and "\ud800" <= max(text) <= "\udfff" for text in given.prompt):
        raise UserError("a prompt is not valid UTF-8 text")


def _read(tokenizer: Tokenizer, text: str, chat: bool) -> Document:
    """The ids of a prompt, without the bos that every model puts before it by itself."""
    if not chat:
        return tokenizer.encode(text)
    ids = tokenizer.encode(tokenizer.render_chat([{"role": "user", "content": text}]), specials=True)
    return ids[1:] if len(ids) and ids[0] == tokenizer.specials.bos else ids
