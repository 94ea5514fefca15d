"""From configs to things: tokenizers, documents and models of a run, each made once and remembered."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from epigone import verifiers
from epigone.data import corpora
from epigone.data.tokenizers import Tokenizer
from epigone.errors import UserError
from epigone.evaluate import NGramIndex
from epigone.identity import canonical, fingerprint
from epigone.lineage import Node, Text, TrainedTokenizer, Written
from epigone.models.language_model import MAX_LENGTH, Document, LanguageModel
from epigone.models.ngram import NGram, NGramModel
from epigone.storage.folders import fetched, is_whole
from epigone.store import Store
from epigone.writing import Scores, check_sizes, is_chosen, prompts_of, scores, write_chosen, writing_flops

TokenizerConfig = Any
"""A TrainedTokenizer, or a config of `epigone.data.foreign_tokenizers`, which has a `build` of its own."""

KEPT_MODELS = 4
"""Models that stay in memory: a teacher, a judge, the writer of the text and the node itself."""

SAMPLING = ("temperature", "top_k", "top_p", "max_length")
"""Fields of a written text that say how a model samples."""

KEPT_COUNTS = 256
"""Arrays of counts that stay in memory: megabytes together, of texts of a laptop's size."""

KEPT_INDICES = 8
"""Indices of n-grams that stay in memory."""


class Materials:
    """What growing needs, looked up by config. Everything is on disk or made again the same from what is on disk."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._read: tuple[str, list[str]] = ("", [])
        self._encoded: dict[tuple[str, str], list[Document]] = {}
        self._indices: OrderedDict[str, NGramIndex] = OrderedDict()
        self._tokenizers: dict[str, Tokenizer] = {}
        self._made: OrderedDict[tuple[str, ...], np.ndarray] = OrderedDict()
        self._sizes: dict[str, list[int] | None] = {}
        self._models: OrderedDict[str, LanguageModel] = OrderedDict()

    def strings(self, text: Text) -> corpora.Documents:
        """The documents of a corpus' split, prepared on first use."""
        splits = text.corpus.prepare(self.store.data)
        if text.split not in splits:
            raise UserError(f"corpus {text.corpus} has no split '{text.split}'; it has {', '.join(splits)}")
        return splits[text.split]

    def _whole(self, text: Text) -> list[str]:
        """All documents of a split; those that were read last stay at hand: tokenizers and models read the same."""
        name = fingerprint(text)
        if self._read[0] != name:
            self._read = (name, list(self.strings(text)))
        return self._read[1]

    def tokenizer(self, config: TokenizerConfig) -> Tokenizer:
        """A tokenizer, trained or read from its files on first use and stored with the run."""
        name = fingerprint(config)
        if name not in self._tokenizers:
            path = self.store.tokenizer(config)
            if not path.exists():
                with self.store.alone(path):
                    if not path.exists():
                        self._built(config).save(path)
            self._tokenizers[name] = Tokenizer.load(path)
        return self._tokenizers[name]

    def _built(self, config: TokenizerConfig) -> Tokenizer:
        if not isinstance(config, TrainedTokenizer):
            shared = self.store.data / "pretrained" / "tokenizers" / f"{fingerprint(config)}.json"
            if not shared.exists():
                config.build().save(shared)
            return Tokenizer.load(shared)
        if config.text.skip or config.text.tokens is not None:
            raise UserError(f"a tokenizer is trained on a whole split, not on a part: {config.text}")
        return config.algorithm.build(self._whole(config.text))

    def documents(self, source: Text | Written, config: TokenizerConfig) -> list[Document]:
        """The token documents of a source, real or written by a node that is done."""
        if source.subsample is not None:
            every = self.documents(replace(source, subsample=None), config)
            chosen = corpora.subsample_indices(every, source.subsample, seed_of(fingerprint(source), "subsample"))
            return [every[index] for index in chosen]
        tokenizer = self.tokenizer(config)
        whole = replace(source, skip=0, tokens=None) if isinstance(source, Text) else source
        name = (fingerprint(whole), tokenizer.identity)
        if name not in self._encoded:
            if isinstance(whole, Written):
                self._encoded[name] = self._written(whole, tokenizer)
            else:
                self._encoded[name] = tokenizer.encode_batch(self._whole(whole))
        if isinstance(source, Text) and whole != source:
            return corpora.slice_documents(self._encoded[name], source.skip, source.tokens)
        return self._encoded[name]

    def once(self, name: tuple[str, ...], make: Callable[[], np.ndarray]) -> np.ndarray:
        """What was made under this name, or is now: a text that many generations read is counted once."""
        if name not in self._made:
            self._made[name] = make()
            while len(self._made) > KEPT_COUNTS:
                self._made.popitem(last=False)
        self._made.move_to_end(name)
        return self._made[name]

    def byte_counts(self, source: Text, config: TokenizerConfig) -> list[int] | None:
        """UTF-8 bytes of each document of a real text; None where the tokenizer loses some of it.

        Bits a byte would come out too low there.
        """
        name = fingerprint([source, config])
        if name not in self._sizes:
            documents, decode = self.documents(source, config), self.tokenizer(config).decode
            texts = self._texts(source, config)
            lost = any(decode(ids) != text for text, ids in zip(texts, documents, strict=True))
            self._sizes[name] = None if lost else [len(text.encode()) for text in texts]
        return self._sizes[name]

    def _texts(self, source: Text, config: TokenizerConfig) -> list[str]:
        """The documents of a source, or of its part, as they were before they were encoded."""
        if source.subsample is not None:
            raise UserError(f"a text that is held out is read whole, and subsample={source.subsample} draws of it")
        strings = self._whole(source)
        if source.skip == 0 and source.tokens is None:
            return strings
        encoded = self.documents(replace(source, skip=0, tokens=None), config)
        return [strings[index] for index in corpora.slice_indices(encoded, source.skip, source.tokens)]

    def index(self, texts: Sequence[Text | Written], config: TokenizerConfig) -> NGramIndex:
        """The n-grams of texts, against which novelty is counted, or what is left of them."""
        name = fingerprint([texts, config])
        if name not in self._indices:
            documents = [document for text in texts for document in self.documents(text, config)]
            self._indices[name] = NGramIndex.build(documents, self.tokenizer(config).size)
            while len(self._indices) > KEPT_INDICES:
                self._indices.popitem(last=False)
        self._indices.move_to_end(name)
        return self._indices[name]

    def card(self, source: Text | Written) -> dict[str, Any]:
        """Where a source comes from, for the record of the node that learns it."""
        drawn = {} if source.subsample is None else {"subsample": source.subsample}
        if isinstance(source, Written):
            return {**corpora.read_text(self.store.written(source)).card, **drawn}
        sizes = {"skip": source.skip} | ({} if source.tokens is None else {"tokens": source.tokens})
        return {**self.strings(source).card, **sizes, **drawn}

    def _written(self, source: Written, tokenizer: Tokenizer) -> list[Document]:
        directory = self.store.written(source)
        if not is_whole(directory):
            with self.store.alone(directory):
                if not is_whole(directory):
                    documents, writer = self._write(source, directory)
                    if writer.identity == tokenizer.identity:
                        return documents
        text = corpora.read_text(directory)
        if text.card["tokenizer"] == tokenizer.identity:
            return text.tokens()
        return tokenizer.encode_batch(list(text))

    def _write(self, source: Written, directory: Path) -> tuple[list[Document], Tokenizer]:
        """Let a node write, and store what it wrote; with the tokenizer that it wrote in."""
        writer = self.store.lineage[source.by]
        identity = self.store.lineage.identities[source.by]
        tokenizer = self.tokenizer(writer.tokenizer)
        sampling: dict[str, Any] = {name: getattr(source, name) for name in SAMPLING}
        if is_chosen(source):
            documents, told, tokens = self._chosen(source, identity)
        else:
            documents = self._writer(source).write(
                source.tokens, seed_of(identity, _drawn("write", source)), **sampling
            )
            told, tokens = {}, count_tokens(documents)
        models = [self.filled(self.store.lineage[key]) for key in (source.by, source.judged_by) if key]
        flops = writing_flops(tokens, models, longest(writer, source.max_length))
        card = {
            "name": f"text of {source.by}",
            "parents": [{"key": source.by, "identity": identity}],
            "sampling": canonical(sampling),
            "tokenizer": tokenizer.identity,
            **told,
            **({"marks": [type(mark).__name__ for mark in source.marks]} if source.marks else {}),
            **({"flops": flops} if flops else {}),
        }
        corpora.write_text(directory, [tokenizer.decode(ids) for ids in documents], card, tokens=documents)
        return documents, tokenizer

    def _writer(self, source: Written) -> LanguageModel:
        """The model that writes a text, with the marks that it sets."""
        model: Any = self.model(self.store.lineage[source.by])
        return model.marked(source.marks) if source.marks else model

    def _chosen(self, source: Written, identity: str) -> tuple[list[Document], dict[str, Any], int]:
        """A text that is prompted or judged, what its card says of that, and the tokens of all candidates."""
        lineage, writer = self.store.lineage, self.store.lineage[source.by]
        decode, score = self.tokenizer(writer.tokenizer).decode, self._score(source, identity)
        holds = None if source.rule is None else lambda document: bool(source.rule(decode(document)))
        documents, tally = write_chosen(
            source,
            self._writer(source),
            score,
            self.prompts(source),
            longest(writer, source.max_length),
            lambda block: seed_of(identity, _drawn(f"write block {block}", source)),
            holds,
        )
        told: dict[str, Any] = {"chosen": {"best_of": source.best_of, "keep": source.keep, **tally.card()}}
        if source.judged_by:
            told["chosen"]["judge"] = {"key": source.judged_by, "identity": lineage.identities[source.judged_by]}
        by = {"verifier": source.verifier, "rule": source.rule}
        told["chosen"] |= {name: canonical(value) for name, value in by.items() if value}
        if lineage.evaluation and (source.is_judged or source.rule):
            real = self.documents(lineage.evaluation.text, writer.tokenizer)
            told["chosen"] |= verifiers.verification(tally, real, score, holds)
        if source.prompts:
            told["prompts"] = {**self.card(source.prompts), "prompt_tokens": source.prompt_tokens}
        return documents, told, tally.tokens

    def _score(self, source: Written, identity: str) -> Scores | None:
        """What scores the documents of a text: a node's likelihood, or a verifier that has seen the writer's own."""
        if not source.is_judged:
            return None
        writer = self.store.lineage[source.by]
        if source.judged_by:
            judge, most = self.model(self.store.lineage[source.judged_by]), longest(writer, source.max_length)
            return lambda documents: scores(judge, documents, source.prompt_tokens, most)
        real = self.documents(source.verifier.real, writer.tokenizer)
        tokens = count_tokens(real[: source.verifier.documents])
        knobs: dict[str, Any] = {name: getattr(source, name) for name in SAMPLING}
        written = self._writer(source).write(tokens, seed_of(identity, "verify"), **knobs)
        fitted: Scores = source.verifier.fitted(real, written)
        return fitted

    def prompts(self, source: Written) -> list[Document] | None:
        """What is given of each document that a node completes; None where nothing is."""
        if source.prompts is None:
            return None
        return prompts_of(source, self.documents(source.prompts, self.store.lineage[source.by].tokenizer))

    def check_written(self, source: Written) -> None:
        """Refuse, before any work, a judge and prompts that do not fit the writer. Raises UserError."""
        writer = self.store.lineage[source.by]
        check_sizes(source, longest(writer, source.max_length))
        if source.marks and isinstance(writer.model, NGram):
            raise UserError(f"'{writer.key}' counts, and marks change what a decoder draws: drop them from its text")
        if source.judge:
            judge = self.store.lineage[source.judge]
            ours, theirs = (self.tokenizer(node.tokenizer) for node in (writer, judge))
            if ours.identity != theirs.identity:
                raise UserError(
                    f"'{writer.key}' writes and its judge '{judge.key}' reads another tokenizer, '{ours.name}' and "
                    f"'{theirs.name}': take a judge with the writer's tokenizer"
                )
        if source.verifier:
            self.strings(source.verifier.real)
        if not is_whole(self.store.written(source)):
            self.prompts(source)

    def filled(self, node: Node) -> Any:
        """The model's config of a node, a decoder's with the sizes that its tokenizer says."""
        return node.model if isinstance(node.model, NGram) else fill(node.model, self.tokenizer(node.tokenizer))

    def model(self, node: Node) -> LanguageModel:
        """A node that is done, ready to be asked."""
        key = self.store.lineage.identities[node.key]
        if key not in self._models:
            self.keep(node, load_model(node.model, self.store.weights(node), self.tokenizer(node.tokenizer)))
        self._models.move_to_end(key)
        return self._models[key]

    def kept(self, node: Node) -> LanguageModel | None:
        """The same, if it is at hand."""
        return self._models.get(self.store.lineage.identities[node.key])

    def keep(self, node: Node, model: LanguageModel) -> None:
        """Remember a model, and forget the one that was not used for longest."""
        self._models[self.store.lineage.identities[node.key]] = model
        while len(self._models) > KEPT_MODELS:
            self._models.popitem(last=False)


def _drawn(purpose: str, source: Written) -> str:
    """What a text's randomness is for: every number of a text has its own."""
    return f"{purpose}, draw {source.draw}" if source.draw else purpose


def load_model(config: Any, directory: Path, tokenizer: Tokenizer) -> LanguageModel:
    """A finished model from its directory: counts or weights. JAX is imported only for weights."""
    if isinstance(config, NGram):
        return NGramModel.load(fetched(directory) / "ngram.safetensors")
    from epigone.models import decoder
    from epigone.sampling.decode import DecoderLanguageModel
    from epigone.training import checkpoint

    config = fill(config, tokenizer)
    return DecoderLanguageModel(config, checkpoint.load_params(directory, decoder.abstract(config)))


def fill(config: Any, tokenizer: Tokenizer) -> Any:
    """A decoder's config with the special ids of its tokenizer, and by default its size.

    Ids behind those of the tokenizer are rows of the table and nothing more: they are never predicted. Raises UserError
    for a vocab_size that leaves out tokens.
    """
    size = config.vocab_size or tokenizer.size
    if size < tokenizer.tokens:
        raise UserError(f"vocab_size {size} is less than the {tokenizer.tokens} tokens of the tokenizer")
    if size > tokenizer.size:
        rows = -(-size // config.vocab_multiple) * config.vocab_multiple
        config, size = replace(config, vocab_multiple=rows), tokenizer.size
    return replace(config, vocab_size=size, specials=tokenizer.specials)


def longest(node: Node, most: int = MAX_LENGTH) -> int:
    """Tokens of the longest document that a node writes: it is cut there, and what is cut has no true end."""
    return min(most, getattr(node.model, "max_length", most + 1) - 1)


def seed_of(identity: str, purpose: str) -> int:
    """A 31-bit seed for one purpose of one node."""
    return int(fingerprint([identity, purpose]), 16) % 2**31


def count_tokens(documents: Sequence[Document]) -> int:
    """Events of a text: its tokens and one end a document."""
    return int(sum(len(document) + 1 for document in documents))
