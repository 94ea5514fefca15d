"""Small tokenizers of the kinds that published models have, in folders as Hugging Face lays them out."""

import json

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

TEXT = [
    "The cat sat on the mat, and the dog sat on the cat.",
    "In 1999 there were 12345 cats; in 2026 there're   many more!\n\nSo they say.",
    "Grüße aus Köln, naïve café; def f(x):\n\treturn x ** 2  # power <b>is</b>",
    "He'll say it's THEIRS, won't he? 世界, 世界.",
] * 5
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] | trim }}"
    "{{ eos_token }}\n{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def special(*tokens):
    return [AddedToken(token, special=True, normalized=False) for token in tokens]


def gpt2():
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False))
    inner.add_special_tokens(special("<|endoftext|>"))
    return inner, {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}


def llama3():
    inner = tokenizers.Tokenizer(models.BPE(ignore_merges=True))
    split = pre_tokenizers.Split(tokenizers.Regex(LLAMA3), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.Sequence([split, byte_level]), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=340, initial_alphabet=alphabet, show_progress=False))
    inner.add_special_tokens(special("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|user|>"))
    bos = inner.token_to_id("<|begin_of_text|>")
    inner.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", bos)]
    )
    return inner, {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "chat_template": TEMPLATE}


def sentencepiece(normalizer, pre_tokenizer, decoder, added):
    """BPE with one token a byte for what has none; `added` are tokens that are found in the text, but not special."""
    inner = tokenizers.Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    inner.normalizer = normalizer
    if pre_tokenizer is not None:
        inner.pre_tokenizer = pre_tokenizer
    fixed = ["<unk>", "<s>", "</s>", *BYTES, *added]
    inner.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=420, special_tokens=fixed, show_progress=False))
    described = json.loads(inner.to_str())
    kept = {"<unk>": True, "<s>": True, "</s>": True} | dict.fromkeys(added, False)
    tokens = [token for token in described["added_tokens"] if token["content"] in kept]
    described["added_tokens"] = [token | {"special": kept[token["content"]]} for token in tokens]
    vocabulary = described["model"]["vocab"]
    for token in ("</", "s>"):
        vocabulary.setdefault(token, len(vocabulary))
    # Merges that end in a special token, as conversions from SentencePiece may have them.
    described["model"]["merges"] += [["<", "/"], ["s", ">"], ["</", "s>"]]
    inner = tokenizers.Tokenizer.from_str(json.dumps(described))
    inner.decoder = decoder
    flags = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)
    end = {"__type": "AddedToken", "content": "</s>", **flags}
    return inner, {"bos_token": "<s>", "eos_token": end, "unk_token": "<unk>"}


def llama2():
    normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    return sentencepiece(normalizer, None, decoders.Sequence(steps), [])


def gemma():
    split = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    return sentencepiece(normalizers.Replace(" ", "▁"), split, decoders.Sequence(steps), ["\n\n", "▁▁"])


def unigram():
    inner = tokenizers.Tokenizer(models.Unigram())
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=120, unk_token="<unk>", special_tokens=["<unk>", "<s>", "</s>"], show_progress=False
    )
    inner.train_from_iterator(TEXT, trainer)
    described = json.loads(inner.to_str())
    described["model"]["vocab"] += [[byte, -20.0] for byte in BYTES]
    described["model"]["byte_fallback"] = True
    inner = tokenizers.Tokenizer.from_str(json.dumps(described))
    inner.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return inner, {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>", "unk_token": "<unk>"}


def words():
    inner = tokenizers.Tokenizer(models.WordLevel(unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.WordLevelTrainer(special_tokens=["[UNK]", "[PAD]", "[EOS]"], show_progress=False)
    inner.train_from_iterator(TEXT, trainer)
    return inner, {"pad_token": "[PAD]", "eos_token": "[EOS]", "unk_token": "[UNK]"}


KINDS = [gpt2, llama3, llama2, gemma, unigram, words]


def write(folder, kind, **changes):
    """A folder of one kind; a change to None takes an entry of its config away."""
    inner, config = kind()
    folder.mkdir(parents=True, exist_ok=True)
    inner.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast"} | config | changes
    (folder / "tokenizer_config.json").write_text(
        json.dumps({name: value for name, value in config.items() if value is not None})
    )
    return folder
