import subprocess
import sys

PREPARE = """
import sys
from pathlib import Path
import numpy as np
from epigone.data import corpora, pipeline, tokenizers
directory = Path(sys.argv[1])
Path(directory / "a.txt").write_text("\\n\\n".join(f"one {i} two" for i in range(300)))
documents = corpora.TextFiles(str(directory / "a.txt")).prepare(directory / "data")["train"]
tokenizer = tokenizers.Words().build(documents)
ids = tokenizer.encode_batch(list(documents))
corpora.write_text(directory / "text", [tokenizer.decode(ids[0])], {"name": "x"}, [ids[0]])
batches = pipeline.Batches([pipeline.pack(ids, 16)], None, 4, 0)
print("jax" in sys.modules, "tensorflow" in sys.modules)
next(batches.iterate())
batches.batch(3)
print("tensorflow" in sys.modules)
"""


def run(code, *arguments):
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True).stdout


def test_neither_jax_nor_tensorflow_is_imported_to_prepare_text(tmp_path):
    assert run(PREPARE, str(tmp_path)) == "False False\nFalse\n"


def test_the_slow_libraries_wait_until_they_are_needed():
    code = """
import sys
import epigone.data.corpora, epigone.data.pipeline, epigone.data.tokenizers
print([name for name in ("jax", "grain", "tensorflow_datasets", "pyarrow", "tokenizers") if name in sys.modules])
"""
    assert run(code) == "[]\n"


def test_a_process_ends_while_batches_are_being_made_ahead():
    code = """
import numpy as np
from epigone.data.pipeline import Batches, pack
batches = Batches([pack([np.arange(4, 900)], 16)], None, 4, 0).iterate()
next(batches)
print("done")
"""
    assert run(code) == "done\n"
