"""`epigone sample NODE`: texts of a node that is grown or imported, shown while they are written."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from epigone.data.tokenizers import Tokenizer
from epigone.errors import UserError
from epigone.models.language_model import Document, LanguageModel
from epigone.opened import open_node


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
        scores: show the log-probability of each text in nats per token.
    """

    node: tyro.conf.Positional[str]
    run: Path | None = None
    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    chat: bool = False
    n: int = 4
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    max_length: int = 128
    seed: int = 0
    scores: bool = False


def pieces(given: Sample) -> Iterator[str]:
    """The texts, prompt first, in pieces to be printed one after the other.

    Raises UserError for a node or run that is not there, and for a prompt that the model cannot read.
    """
    _check(given)
    opened = open_node(given.node, given.run)
    tokenizer, model = opened.tokenizer, opened.model
    prompts = [_read(tokenizer, text, given.chat) for text in given.prompt or ("",)]
    shown = _Shown(tokenizer, prompts, given)
    top_k, temperature = (1, 1.0) if given.temperature == 0 else (given.top_k, given.temperature)
    knobs: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": given.top_p}
    for prompt, sample, tokens in model.stream(prompts, given.seed, samples=given.n, length=given.max_length, **knobs):
        yield from shown.add(prompt, sample, tokens)
    yield from shown.rest(model)


class _Shown:
    """Texts that grow side by side: the first one is shown at once, the others in their order at the end."""

    def __init__(self, tokenizer: Tokenizer, prompts: list[Document], given: Sample) -> None:
        self.tokenizer, self.given = tokenizer, given
        self.one_line = len(prompts) * given.n > 1
        begun = [[] if given.chat else [prompt] for prompt in prompts]
        self.texts: dict[tuple[int, int], list[Document]] = {
            (i, j): list(parts) for i, parts in enumerate(begun) for j in range(given.n)
        }
        self.decoder = tokenizer.stream_decoder()
        self.begun = False

    def add(self, prompt: int, sample: int, tokens: Document) -> Iterator[str]:
        """What can be shown of the first text, when it has grown."""
        self.texts[prompt, sample].append(tokens)
        if (prompt, sample) == (0, 0) and not self.given.scores:
            news = [tokens] if self.begun else self.texts[0, 0]
            self.begun = True
            for part in news:
                yield self._line(self.decoder.add(part))

    def rest(self, model: LanguageModel) -> Iterator[str]:
        """The end of the first text, and the others whole."""
        texts = [np.concatenate([np.zeros(0), *parts]).astype(np.int32) for parts in self.texts.values()]
        if self.begun:
            yield self._line(self.decoder.end()) + "\n"
        for whole in texts[1:] if self.begun else texts:
            score = f"{np.mean(model.log_probs([whole])[0]):7.3f}  " if self.given.scores else ""
            yield score + self._line(self.tokenizer.decode(whole)) + "\n"

    def _line(self, text: str) -> str:
        return " ".join(text.split("\n")) if self.one_line else text


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
