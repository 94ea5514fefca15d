"""An export is a folder that transformers loads and that computes the same; it appears whole or not at all."""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import hf_models
import jax
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file
from tokenizers import Tokenizer as Fast
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from epigone.cli import main
from epigone.data.corpora import TextFiles
from epigone.data.tokenizers import Words
from epigone.errors import UserError
from epigone.identity import canonical
from epigone.interchange.huggingface import read_config
from epigone.lineage import Evaluation, Lesson, Lineage, Node, Text, TrainedTokenizer
from epigone.materials import fill
from epigone.models import decoder
from epigone.models.config import DecoderConfig
from epigone.models.ngram import NGram, NGramModel
from epigone.opened import OpenedNode, open_node
from epigone.store import Store
from epigone.training import checkpoint
from epigone.verbs import export as exporting
from epigone.verbs.export import Export, export, export_node

CORPUS = Text(TextFiles("corpus.txt"))
WORDS = TrainedTokenizer(Words(), CORPUS)
MODEL = DecoderConfig(layers=2, model_size=24, heads=3, kv_heads=1, max_length=64)
TEXTS = ["The cat sees the dog by the river.", "A bird follows the old king.", "The loud bird sings at night."]
TEXT = "The old cat follows a bird"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with a decoder of random weights, another seed of it, and a trigram, as `grow` leaves them."""
    path = tmp_path_factory.mktemp("grown") / "run"
    lesson = Lesson((CORPUS,))
    nodes = (Node("own", 0, MODEL, WORDS, lesson), Node("own", 0, MODEL, WORDS, lesson, seed=1))
    lineage = Lineage("grown", (*nodes, Node("count", 0, NGram(), WORDS, lesson)), Evaluation(CORPUS, CORPUS))
    store = Store(path, lineage)
    store.write_lineage()
    store.tokenizer(WORDS).parent.mkdir()
    tokenizer = Words().build(TEXTS)
    tokenizer.save(store.tokenizer(WORDS))
    for node in lineage.nodes:
        place = store.directory(node) / "model"
        if isinstance(node.model, NGram):
            place.mkdir(parents=True)
            NGramModel.fit(NGram(), tokenizer.encode_batch(TEXTS), tokenizer.size).save(place / "ngram.safetensors")
        else:
            config = fill(MODEL, tokenizer)
            params = decoder.init(config, node.seed)
            noise = np.random.default_rng(node.seed)
            louder = jax.tree.map(lambda x, n=noise: x + 0.3 * n.standard_normal(x.shape).astype(x.dtype), params)
            checkpoint.save_params(place, louder)
        identity = lineage.identities[node.key]
        known = {"key": node.key, "identity": identity, "config": canonical(node), "parents": [], "data": []}
        store.write_record(node, known | {"parameters": 1000, "kind": "decoder"})
    return path


@pytest.fixture
def own(run) -> OpenedNode:
    return open_node("own@0", run)


def load(folder: Path):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()


def both_logits(opened: OpenedNode, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Ours and theirs [T, V] on a text, each through its own tokenizer."""
    ids = opened.tokenizer.encode(TEXT)
    tokens_BT = np.concatenate([[opened.tokenizer.specials.bos], ids])[None]
    steps_BT = np.arange(tokens_BT.shape[1])[None]
    model = opened.model
    ours = jax.jit(decoder.apply, static_argnums=0)(
        model.config, model.params, tokens_BT, steps_BT, np.ones_like(steps_BT)
    )
    theirs_ids = transformers.AutoTokenizer.from_pretrained(folder)(TEXT, return_tensors="pt")["input_ids"]
    assert theirs_ids.tolist() == tokens_BT.tolist()
    with torch.no_grad():
        return np.asarray(ours)[0], load(folder)(theirs_ids).logits[0].numpy()


def test_transformers_computes_the_same_logits(own, tmp_path):
    files = export(own, tmp_path / "out")
    named = {"README.md", "config.json", "generation_config.json", "model.safetensors"}
    assert named | {"tokenizer.json", "tokenizer_config.json"} == set(files)
    ours_TV, theirs_TV = both_logits(own, tmp_path / "out")
    never = list(own.tokenizer.specials.never)
    assert never == [0, 1]
    assert theirs_TV.std() > 0.3
    np.testing.assert_allclose(np.delete(ours_TV, never, 1), np.delete(theirs_TV, never, 1), rtol=0, atol=1e-4)
    assert np.all(ours_TV[:, never] == -1e9)
    assert np.all(np.abs(theirs_TV[:, never]) < 100)


def test_generate_writes_the_same_greedy_text_with_the_settings_of_the_folder(own, tmp_path):
    export(own, tmp_path / "out")
    ids = own.tokenizer.encode(TEXT)
    ((ours,),) = own.model.sample([ids], 0, length=20, top_k=1)
    given = torch.tensor([[1, *ids.tolist()]])
    theirs = load(tmp_path / "out").generate(given, do_sample=False, max_new_tokens=20)[0, given.shape[1] :].tolist()
    assert theirs[: len(ours)] == ours.tolist()
    assert theirs[len(ours) :] in ([], [2])


def test_the_snippet_of_the_card_runs_in_the_folder(own, tmp_path, monkeypatch, capsys):
    export(own, tmp_path / "out")
    (snippet,) = re.findall(r"```python\n(.*?)```", (tmp_path / "out" / "README.md").read_text(), re.S)
    monkeypatch.chdir(tmp_path / "out")
    torch.manual_seed(0)
    exec(compile(snippet, "README.md", "exec"), {})
    assert len(capsys.readouterr().out.split()) > 1


def test_ids_of_the_configs(own, tmp_path):
    export(own, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    assert {name: config[name] for name in ids} == ids
    assert generation == {**ids, "suppress_tokens": [0, 1]}
    assert config["vocab_size"] == own.tokenizer.size
    stops = replace(own.tokenizer.specials, stops=(7, 9), never=())
    assert exporting.generation_config(stops) == {**ids, "eos_token_id": [2, 7, 9]}


def test_another_type_rounds_every_weight_once(own, tmp_path):
    export(own, tmp_path / "wide")
    export(own, tmp_path / "narrow", dtype="bfloat16")
    wide, narrow = (load_torch(tmp_path / name / "model.safetensors") for name in ("wide", "narrow"))
    assert wide.keys() == narrow.keys()
    for name, tensor in wide.items():
        assert narrow[name].dtype == torch.bfloat16
        assert torch.equal(tensor.to(torch.bfloat16), narrow[name]), name
    assert json.loads((tmp_path / "narrow" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def load_torch(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file as load_tensors

    return load_tensors(path)


def test_weights_in_many_files_are_the_same_weights(own, tmp_path):
    export(own, tmp_path / "one")
    files = export(own, tmp_path / "many", shard_bytes=4000)
    assert "model.safetensors.index.json" in files
    parts = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(parts) > 2
    joined = {name: tensor for part in parts for name, tensor in load_file(part).items()}
    whole = load_file(tmp_path / "one" / "model.safetensors")
    assert joined.keys() == whole.keys()
    assert all(np.array_equal(joined[name], whole[name]) for name in whole)
    load(tmp_path / "many")


def hugging_face_folder(folder: Path, family: str, dtype: torch.dtype) -> Path:
    """A tiny model of a family with a tokenizer of as many words."""
    hf_models.write(folder, family, dtype=dtype)
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3}
    words = [*TEXT.split(), *(f"w{i}" for i in range(hf_models.VOCAB))][: hf_models.VOCAB - 4]
    fast = Fast(WordLevel(vocabulary | {word: 4 + i for i, word in enumerate(words)}, unk_token="<unk>"))
    fast.pre_tokenizer = Whitespace()
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=fast, **named).save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Theirs\n")
    return folder


@pytest.mark.parametrize(
    ("family", "dtype"), [("gemma3", torch.bfloat16), ("qwen2", torch.float32), ("phi3_longrope", torch.bfloat16)]
)
def test_import_export_import_loses_nothing(family, dtype, tmp_path):
    theirs = hugging_face_folder(tmp_path / "theirs", family, dtype)
    assert main(["import", str(theirs), "--as", "theirs", "--run", str(tmp_path / "runs" / "first")]) == 0
    first = open_node("theirs@0", tmp_path / "runs" / "first")
    export(first, tmp_path / "out")
    assert main(["import", str(tmp_path / "out"), "--as", "again", "--run", str(tmp_path / "runs" / "second")]) == 0
    second = open_node("again@0", tmp_path / "runs" / "second")
    assert second.model.config == first.model.config
    assert second.tokenizer.specials == first.tokenizer.specials
    assert second.tokenizer.encode(TEXT).tolist() == first.tokenizer.encode(TEXT).tolist()
    before, after = (jax.tree.leaves_with_path(opened.model.params) for opened in (first, second))
    for (path, old), (_, new) in zip(before, after, strict=True):
        assert old.dtype == new.dtype
        assert np.array_equal(np.asarray(old).view(np.uint8), np.asarray(new).view(np.uint8)), path
    mine, original = (load_torch(folder / "model.safetensors") for folder in (tmp_path / "out", theirs))
    assert mine.keys() == original.keys()
    assert all(torch.equal(mine[name], original[name]) and mine[name].dtype == dtype for name in mine)
    assert read_config(json.loads((tmp_path / "out" / "config.json").read_text())) == read_config(
        json.loads((theirs / "config.json").read_text())
    )
    tokens = torch.randint(4, hf_models.VOCAB, (2, 14))
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "out")(tokens).logits, load(theirs)(tokens).logits)
    card = (tmp_path / "out" / "README.md").read_text()
    assert 'license: "apache-2.0"' in card
    assert 'base_model: ["theirs"]' in card
    assert "can never be predicted" not in card


def snapshot(folder: Path) -> dict[str, str]:
    """Every file below a folder by the hash of its content."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def refused(opened: OpenedNode, to: Path, said: str, **arguments) -> None:
    """An export is refused in one line, and no file below the parent of its folder is touched."""
    before = snapshot(to.parent)
    with pytest.raises(UserError, match=said) as error:
        export(opened, to, **arguments)
    assert "\n" not in str(error.value)
    assert snapshot(to.parent) == before


def test_a_model_that_counts_is_refused(run, tmp_path):
    refused(open_node("count@0", run), tmp_path / "out", "'count@0' counts words")


def test_a_model_that_no_family_has_is_refused_before_anything_is_written(run, own, tmp_path):
    odd = replace(own, node=replace(own.node, model=replace(MODEL, pre_norm=False, post_norm=False)))
    refused(odd, tmp_path / "out", "pre_norm")


def test_a_folder_with_something_else_in_it_is_refused(run, own, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    refused(own, tmp_path / "mine", "has files that are no export")
    refused(own, tmp_path / "mine" / "thesis.txt", "is a file")
    export(open_node("own@0.s1", run), tmp_path / "out")
    refused(own, tmp_path / "out", r"an export of another node, 'own@0.s1'")


def test_an_export_that_was_worked_on_is_refused(own, tmp_path):
    export(own, tmp_path / "out")
    with (tmp_path / "out" / "README.md").open("a") as card:
        card.write("My own remarks.")
    refused(own, tmp_path / "out", r"README.md' was added or changed")
    export(own, tmp_path / "other")
    (tmp_path / "other" / "notes").mkdir()
    (tmp_path / "other" / "notes" / "a.txt").write_text("x")
    refused(own, tmp_path / "other", r"notes' was added or changed")


@pytest.mark.parametrize("given", [{"dtype": "int4"}, {"shard_bytes": 0}])
def test_bad_arguments_are_refused(own, tmp_path, given):
    refused(own, tmp_path / "out", "|".join(("dtype 'int4'", "shard_size 0")), **given)


def test_an_older_export_is_replaced_and_an_empty_folder_filled(own, tmp_path):
    (tmp_path / "out").mkdir()
    export(own, tmp_path / "out")
    first = snapshot(tmp_path)
    export(own, tmp_path / "out")
    assert snapshot(tmp_path) == first
    export(own, tmp_path / "out", dtype="bfloat16", shard_bytes=4000)
    second = snapshot(tmp_path)
    assert "out/model.safetensors" not in second
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_export_that_fails_leaves_what_was_there(own, tmp_path, monkeypatch, error):
    export(own, tmp_path / "out")
    before = snapshot(tmp_path)

    def fails(*_):
        raise error

    monkeypatch.setattr(exporting, "model_card", fails)
    for to in ("out", "new"):
        with pytest.raises(type(error)):
            export(own, tmp_path / to, dtype="bfloat16")
        assert snapshot(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


KILLED = """
import os, signal, sys
from pathlib import Path
from epigone.verbs import export
rename = Path.rename
def killing(path, to):
    if path.name.endswith(".partial"):
        os.kill(os.getpid(), signal.SIGKILL)
    return rename(path, to)
Path.rename = killing
with export._whole(Path(sys.argv[1])) as folder:
    (folder / "README.md").write_text("unfinished")
"""


def killed_between_the_renames(to: Path) -> None:
    """An export to the folder by another process, which ends where the folder is away for an instant."""
    assert subprocess.run([sys.executable, "-c", KILLED, str(to)], check=False).returncode == -signal.SIGKILL
    assert not to.exists()
    assert {path.suffix for path in to.parent.glob(f".{to.name}.*")} == {".partial", ".before"}


def finished(folder: Path) -> dict[str, str]:
    """The files below a folder but for those of exports that were killed before they were whole."""
    return {name: digest for name, digest in snapshot(folder).items() if ".partial/" not in name}


def test_what_a_killed_export_left_is_put_back_by_the_next(own, tmp_path, monkeypatch):
    export(own, tmp_path / "out")
    before = snapshot(tmp_path)
    killed_between_the_renames(tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(exporting, "DTYPES", ("float32", "int4"))
        with pytest.raises(Exception, match="int4"):
            export(own, tmp_path / "out", dtype="int4")
    assert finished(tmp_path) == before
    killed_between_the_renames(tmp_path / "out")
    export(own, tmp_path / "out")
    assert finished(tmp_path) == before


def test_what_was_put_back_is_guarded_as_ever(own, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    killed_between_the_renames(tmp_path / "out")
    with pytest.raises(UserError, match="has files that are no export"):
        export(own, tmp_path / "out")
    assert finished(tmp_path).keys() == {"out/thesis.txt"}


def test_a_killed_process_of_the_same_number_is_in_nobodys_way(own, tmp_path):
    export(own, tmp_path / "out")
    before = snapshot(tmp_path)
    for end in ("partial", "before"):
        (tmp_path / f".out.{os.getpid()}.{end}").mkdir()
        (tmp_path / f".out.{os.getpid()}.{end}" / "README.md").write_text("left")
    export(own, tmp_path / "out")
    assert snapshot(tmp_path) == before


def test_the_verb(run, tmp_path, capsys):
    assert main(["export", "own@0", "--run", str(run), "--to", str(tmp_path / "out"), "--dtype", "bfloat16"]) == 0
    assert "README.md" in capsys.readouterr().out
    assert main(["export", "own@0", "--run", str(run), "--to", str(run)]) == 2
    assert "has files that are no export" in capsys.readouterr().err
    export_node(Export("own@0", tmp_path / "again", run=run, shard_size=1))
    assert (tmp_path / "again" / "model.safetensors").exists()
