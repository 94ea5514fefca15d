"""The examples of docs/extending.md, run as they stand there: a fork's divergence, data regime and prompt box."""

import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from epigone.arena.collector import Collection
from epigone.arena.detectors import Query, calibrated, detected
from epigone.arena.endpoint import Endpoint
from epigone.families import chain
from epigone.lessons.objective import Objective
from epigone.lineage import Evaluation, Lesson, Lineage, Node, Text, TrainedTokenizer
from epigone.overrides import override

PAGE = Path(__file__).parent.parent / "docs" / "extending.md"


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """Every Python block of the page, written to the file that its first line names, on the path."""
    blocks = re.findall(r"```python\n# (\w+\.py)\n(.*?)```", PAGE.read_text(), flags=re.S)
    for name, code in blocks:
        (tmp_path / name).write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    return [name for name, _ in blocks]


def lineage(objective: Objective) -> Lineage:
    text = Text("corpus", tokens=900)
    node = Node("student", 0, None, TrainedTokenizer("words", text), Lesson((text,), objective=objective))
    return Lineage("fork", (node,), Evaluation(text, text))


def test_a_divergence_from_a_fork_trains_by_an_override(modules):
    assert "my_divergences.py" in modules
    given = ["student.lesson.objective.divergence=my_divergences:squared_hellinger"]
    objective = override(lineage(Objective(temperature=2.0)), given)["student@0"].lesson.objective
    student, teacher = np.random.default_rng(0).normal(size=(2, 3, 4, 5))
    p, s = (np.exp(x / 2) / np.exp(x / 2).sum(-1, keepdims=True) for x in (teacher, student))
    expected = 4 * 0.5 * ((np.sqrt(p) - np.sqrt(s)) ** 2).sum(-1)
    loss = objective.loss(jnp.asarray(student), jnp.asarray(teacher), jnp.zeros((3, 4), int))
    np.testing.assert_allclose(loss, expected, rtol=1e-5, atol=1e-6)


def test_a_policy_a_detector_and_prompts_from_a_fork_work_in_the_box(modules):
    assert "my_box.py" in modules
    import my_box

    logits = np.log(np.array([[0.5, 0.3, 0.15, 0.04, 0.01], [0.2] * 5], np.float32))
    log_probs, shown = my_box.policy()(jnp.asarray(logits), jnp.zeros(2, int), jnp.zeros((2, 0), int))
    np.testing.assert_allclose(log_probs, logits, rtol=1e-5)
    assert np.asarray(shown).tolist() == [[True, True, True, False, False], [True] * 5]
    windows = [[Query(0.0, "a", np.zeros(n, np.int32)) for n in range(1 + size)] for size in range(20)]
    threshold = calibrated([my_box.longest(window) for window in windows], rate=0.1)
    assert detected([my_box.longest([Query(0.0, "b", np.zeros(90, np.int32))])], threshold)[0] == 1.0
    endpoint = Endpoint("http://stub/v1", "m")
    assert len(list(Collection("months", endpoint, my_box.months).prompts(None))) == 3


def test_a_regime_from_a_fork_makes_a_chain(modules):
    assert "my_regimes.py" in modules
    from my_regimes import window

    family = lineage(Objective())
    nodes = chain(family["student@0"], 5, window, name="window")
    assert [source.by for source in nodes[-1].lesson.text] == ["window@2", "window@3", "window@4"]
    assert [source.tokens for source in nodes[0].lesson.text] == [900]
    assert {sum(source.tokens for source in node.lesson.text) for node in nodes} == {900}
    grown = Lineage("fork", (*family.nodes, *nodes), family.evaluation)
    assert len(set(grown.identities.values())) == 6
