"""Sampling side by side with transformers, CTranslate2 and llama.cpp: same float32 weights, one alternating run.

A Llama-type decoder with random weights continues prompts by a fixed number of tokens, drawn at temperature 1 from the
whole vocabulary; no end of text stops anyone early. Before anything is timed, all must give the same greedy tokens.
Every round times every library once, in an order that rotates; what is printed are medians over the rounds, and medians
and quartiles of the ratio within a round. All run in one process: the same threads, and the same settings of the C
library's allocator (src/epigone/runtime.py; EPIGONE_RUNTIME=off leaves them as they are).
"""

import argparse
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from epigone.runtime import prepare

prepare()  # before JAX is imported, which reads some of these settings then

# ruff: noqa: E402
import numpy as np
from alternating import in_turn, quartiles

from epigone.models.config import DecoderConfig
from epigone.models.decoder import init, parameter_count
from epigone.models.language_model import Specials
from epigone.models.sharding import Sharding
from epigone.sampling.decode import sample
from epigone.sampling.loop import prepare as prepare_parameters

Generate = Callable[[list[list[int]], int, bool], list[list[int]]]
"""Prompts (bos included), number of new tokens, greedy -> new tokens of each row."""

BATCHES = (1, 32)


class Shape(NamedTuple):
    """The sizes of the model and of the work."""

    vocab_size: int
    layers: int
    model_size: int
    heads: int
    prompt: int
    new: int
    threads: int


def our_config(shape: Shape) -> DecoderConfig:
    """The decoder in Epigone; its eos is never drawn."""
    return DecoderConfig(
        vocab_size=shape.vocab_size,
        vocab_multiple=1,
        layers=shape.layers,
        model_size=shape.model_size,
        heads=shape.heads,
        max_length=2 * (shape.prompt + shape.new),
        specials=Specials(never=(2,)),
    )


def epigone(config: DecoderConfig, params: Any) -> Generate:
    """sampling.decode.sample, which puts bos in front itself; the parameters are prepared once."""
    prepared = prepare_parameters(config, Sharding(), params)

    def generate(prompts: list[list[int]], new: int, greedy: bool) -> list[list[int]]:
        rows = [np.array(prompt[1:], np.int32) for prompt in prompts]
        options: dict[str, Any] = {
            "length": new,
            "temperature": float(not greedy),
            "slots": len(prompts),
            "prepared": prepared,
        }
        drawn = sample(config, params, rows, next(SEEDS), **options)
        return [one.tokens.tolist() for (one,) in drawn]

    return generate


SEEDS = iter(range(1, 2**31))


def torch_weights(config: DecoderConfig, params: Any) -> dict[str, np.ndarray]:
    """The weights under the names, and in the layouts, of a transformers Llama."""
    outer, layers = (
        {name: np.asarray(variable[...]) for name, variable in params[group].items()} for group in ("outer", "layers")
    )
    D = config.model_size
    found = {"model.embed_tokens.weight": outer["embedding_VD"], "model.norm.weight": outer["final_norm_scale_D"]}
    inward = {"self_attn.q_proj": "query_LDNH", "self_attn.k_proj": "key_LDKH", "self_attn.v_proj": "value_LDKH"}
    inward |= {"mlp.gate_proj": "gate_LDF", "mlp.up_proj": "up_LDF"}
    outward = {"self_attn.o_proj": "mix_LNHD", "mlp.down_proj": "down_LFD"}
    norms = {"input_layernorm": "attention_norm_scale_LD", "post_attention_layernorm": "ff_norm_scale_LD"}
    for i in range(config.layers):
        named = {name: layers[ours][i].reshape(D, -1).T for name, ours in inward.items()}
        named |= {name: layers[ours][i].reshape(-1, D).T for name, ours in outward.items()}
        named |= {name: layers[ours][i] for name, ours in norms.items()}
        found |= {f"model.layers.{i}.{name}.weight": np.ascontiguousarray(w) for name, w in named.items()}
    return found


def hugging_face(config: DecoderConfig, weights: dict[str, np.ndarray], folder: Path, threads: int) -> Generate:
    """transformers.generate with its default attention; the model is saved to `folder` for the next peer."""
    import torch
    import transformers

    s = config.sizes
    torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    sizes = {"vocab_size": s.V, "hidden_size": s.D, "intermediate_size": s.F, "num_hidden_layers": s.L}
    heads = {"num_attention_heads": s.N, "num_key_value_heads": s.K, "head_dim": s.H}
    limits = {"max_position_embeddings": config.max_length, "rms_norm_eps": config.norm_epsilon}
    described = transformers.LlamaConfig(**sizes, **heads, **limits, **ids, tie_word_embeddings=True)
    model = transformers.LlamaForCausalLM(described).eval()
    tensors = {name: torch.from_numpy(w.copy()) for name, w in weights.items()}
    model.load_state_dict(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]})
    model.save_pretrained(folder)
    model.generation_config.eos_token_id = None

    def generate(prompts: list[list[int]], new: int, greedy: bool) -> list[list[int]]:
        ids = torch.tensor(prompts)
        with torch.inference_mode():
            written = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=not greedy,
                top_k=0,
                top_p=1.0,
                temperature=1.0,
                max_new_tokens=new,
            )
        return written[:, ids.shape[1] :].tolist()

    return generate


def word_tokenizer(vocab_size: int, folder: Path) -> None:
    """A tokenizer of the words w0, w1, ..., which converters ask for."""
    import tokenizers
    import transformers

    model = tokenizers.models.WordLevel({f"w{i}": i for i in range(vocab_size)}, unk_token="w3")
    plain = tokenizers.Tokenizer(model)
    specials = {"unk_token": "w3", "bos_token": "w1", "eos_token": "w2", "pad_token": "w0"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=plain, **specials).save_pretrained(folder)


def ctranslate(config: DecoderConfig, folder: Path, threads: int) -> Generate:
    """CTranslate2, float32, converted from the transformers model in `folder`."""
    import ctranslate2

    word_tokenizer(config.sizes.V, folder)
    converted = folder.parent / "ctranslate2"
    ctranslate2.converters.TransformersConverter(str(folder)).convert(str(converted), quantization="float32")
    generator = ctranslate2.Generator(str(converted), device="cpu", compute_type="float32", intra_threads=threads)

    def generate(prompts: list[list[int]], new: int, greedy: bool) -> list[list[int]]:
        results = generator.generate_batch(
            [[f"w{token}" for token in prompt] for prompt in prompts],
            max_length=new,
            min_length=new,
            include_prompt_in_result=False,
            sampling_topk=1 if greedy else 0,
            sampling_topp=1.0,
            sampling_temperature=1.0,
        )
        return [result.sequences_ids[0] for result in results]

    return generate


def write_gguf(config: DecoderConfig, weights: dict[str, np.ndarray], path: Path) -> None:
    """The weights as a float32 GGUF file. Rows of queries and keys are stored with their two halves interleaved."""
    import gguf

    s = config.sizes
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_length)
    writer.add_embedding_length(s.D)
    writer.add_block_count(s.L)
    writer.add_feed_forward_length(s.F)
    writer.add_head_count(s.N)
    writer.add_head_count_kv(s.K)
    writer.add_rope_dimension_count(s.H)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_epsilon)
    writer.add_vocab_size(s.V)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([f"w{i}" for i in range(s.V)])
    writer.add_token_types([1] * s.V)
    writer.add_token_merges(["w 0"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, s.L)
    for name, w in weights.items():
        for part, heads in (("q_proj", s.N), ("k_proj", s.K)):
            if part in name:
                w = w.reshape(heads, 2, s.H // 2, s.D).swapaxes(1, 2).reshape(w.shape)
        writer.add_tensor(names.get_name(name, (".weight",)), np.ascontiguousarray(w))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama_cpp(config: DecoderConfig, weights: dict[str, np.ndarray], folder: Path, threads: int) -> Generate:
    """llama.cpp's server without its HTTP: one request a row, in as many slots as there are rows."""
    import xllamacpp

    path = folder / "model.gguf"
    write_gguf(config, weights, path)
    settings = xllamacpp.CommonParams()
    settings.model.path = str(path)
    settings.n_parallel, settings.n_ctx = BATCHES[-1], config.max_length * BATCHES[-1]
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = threads
    settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    settings.kv_unified = True  # one cache for all slots is twice as fast here as one for each
    settings.warmup, settings.verbosity = False, -1
    server = xllamacpp.Server(settings)

    def generate(prompts: list[list[int]], new: int, greedy: bool) -> list[list[int]]:
        answers: list[list[int]] = [[]] * len(prompts)

        def ask(row: int) -> None:
            request = {"prompt": prompts[row], "n_predict": new, "ignore_eos": True, "cache_prompt": False}
            choice = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "temperature": float(not greedy), "seed": next(SEEDS)}
            choice |= {} if greedy else {"samplers": ["temperature"]}
            text = server.handle_completions(request | choice)["choices"][0]["text"]
            answers[row] = [int(word) for word in text.split("w")[1:]]

        asked = [threading.Thread(target=ask, args=(row,)) for row in range(len(prompts))]
        for thread in asked:
            thread.start()
        for thread in asked:
            thread.join()
        return answers

    return generate


def libraries(shape: Shape, folder: Path) -> tuple[dict[str, Generate], list[str]]:
    """Every library that is installed, ours first, over the same weights; and a line for each that is not."""
    config = our_config(shape)
    params = init(config, 0)
    weights = torch_weights(config, params)
    saved, threads = folder / "hugging_face", shape.threads
    makers: dict[str, tuple[Callable[[], Generate], str]] = {
        "epigone": (lambda: epigone(config, params), ""),
        "transformers": (lambda: hugging_face(config, weights, saved, threads), "torch==2.13.0 transformers"),
        "CTranslate2": (lambda: ctranslate(config, saved, threads), "ctranslate2 transformers torch==2.13.0"),
        "llama.cpp": (lambda: llama_cpp(config, weights, folder, threads), "xllamacpp gguf"),
    }
    found, absent = {}, []
    for name, (make, packages) in makers.items():
        try:
            found[name] = make()
        except ModuleNotFoundError as error:
            absent.append(f"left out: {name}, for {error.name} is not installed (pip install {packages})")
    return found, absent


def prompts_of(shape: Shape, batch: int) -> list[list[int]]:
    """Random prompts of one length, bos included."""
    ids = np.random.default_rng(0).integers(4, shape.vocab_size, (batch, shape.prompt - 1))
    return [[1, *row] for row in ids.tolist()]


def check_greedy(generators: dict[str, Generate], shape: Shape) -> None:
    """All continue alike where nothing is left to chance. Raises SystemExit with the rows that differ."""
    prompts = prompts_of(shape, 4)
    wanted = generators["epigone"](prompts, 8, True)
    for name, generate in generators.items():
        found = generate(prompts, 8, True)
        if found != wanted:
            raise SystemExit(f"{name} continues differently: {found}, and epigone {wanted}")


def seconds_of(generate: Generate, prompts: list[list[int]], new: int) -> float:
    """Seconds for so many new tokens in each row."""
    start = time.perf_counter()
    rows = generate(prompts, new, False)
    seconds = time.perf_counter() - start
    short = [len(row) for row in rows if len(row) != new]
    if short:
        raise SystemExit(f"rows of {short} tokens instead of {new}")
    return seconds


def measure(generators: dict[str, Generate], shape: Shape, batch: int, new: int, rounds: int) -> dict[str, np.ndarray]:
    """Seconds of every library in every round."""
    prompts = prompts_of(shape, batch)
    jobs = {name: partial(seconds_of, generate, prompts, new) for name, generate in generators.items()}
    for job in jobs.values():
        job()
    return in_turn(jobs, rounds)


def report(seconds: dict[str, np.ndarray], firsts: dict[str, np.ndarray], batch: int, new: int) -> None:
    """A table: tokens a second, time to the first token, and how much faster epigone is, round by round."""
    head = ("library", "tokens/s", "first token, ms", "epigone is faster by", "quartiles")
    print(f"\nbatch {batch}\n{head[0]:14}{head[1]:>10}{head[2]:>18}{head[3]:>23}{head[4]:>16}")
    for name, values in seconds.items():
        low, middle, high = quartiles(values, seconds["epigone"])
        speed, first = batch * new / np.median(values), 1000 * np.median(firsts[name])
        print(f"{name:14}{speed:10.0f}{first:18.1f}{middle:23.2f}{low:10.2f}-{high:.2f}")


def compile_seconds(shape: Shape, batch: int) -> tuple[float, float]:
    """Seconds from a model to its first text in a new process, with an empty cache of compilations and a full one."""
    with tempfile.TemporaryDirectory() as cache:
        setting = os.environ | {"JAX_COMPILATION_CACHE_DIR": cache}
        values = ",".join(map(str, shape))
        command = [sys.executable, __file__, "--first-text", f"{values},{batch}"]
        runs = [subprocess.run(command, env=setting, check=True, capture_output=True, text=True) for _ in range(2)]
    cold, cached = (float(run.stdout.split()[-1]) for run in runs)
    return cold, cached


def first_text(numbers: list[int]) -> None:
    """What `compile_seconds` runs: prints the seconds of the first call, less those of the second."""
    shape, batch = Shape(*numbers[:-1]), numbers[-1]
    config = our_config(shape)
    generate, prompts = epigone(config, init(config, 0)), prompts_of(shape, batch)
    first, second = (seconds_of(generate, prompts, shape.new) for _ in range(2))
    print(first - second)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = {"vocab-size": 32_000, "layers": 8, "model-size": 512, "heads": 8, "prompt": 16, "new": 128}
    for name, value in (defaults | {"threads": os.cpu_count() or 1}).items():
        parser.add_argument(f"--{name}", type=int, default=value, help=f"default {value}")
    parser.add_argument("--rounds", type=int, default=7, help="rounds of all libraries (default 7)")
    parser.add_argument("--compile", action="store_true", help="time compilation too, in new processes")
    parser.add_argument("--first-text", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.first_text:
        first_text([int(number) for number in given.first_text.split(",")])
        return
    shape = Shape(**{name: getattr(given, name) for name in Shape._fields})
    os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[: shape.threads]))
    with tempfile.TemporaryDirectory() as folder:
        generators, absent = libraries(shape, Path(folder))
        check_greedy(generators, shape)
        count = parameter_count(our_config(shape))
        print(f"{count:,} float32 weights, prompt {shape.prompt}, {shape.new} new tokens, {shape.threads} threads")
        for batch in BATCHES:
            firsts = measure(generators, shape, batch, 1, given.rounds)
            report(measure(generators, shape, batch, shape.new, given.rounds), firsts, batch, shape.new)
    print(*absent, sep="\n")
    for layers in (shape.layers, 30) if given.compile else ():
        for batch in BATCHES:
            cold, cached = compile_seconds(shape._replace(layers=layers), batch)
            print(f"compilation, {layers} layers, batch {batch}: {cold:.1f} s, from the cache on disk {cached:.1f} s")


if __name__ == "__main__":
    main()
