"""Identity, order, and what may not be a lineage."""

import dataclasses
import subprocess
import sys
from dataclasses import dataclass
from functools import partial

import pytest

from epigone import regimes
from epigone.errors import Fault, UserError
from epigone.families import chain, fan_out, population, repeat
from epigone.identity import canonical, fingerprint, restore
from epigone.lessons.objective import Objective
from epigone.lineage import Claim, Evaluation, Lesson, Lineage, Node, Population, Text, TrainedTokenizer, Written
from epigone.models.config import DecoderConfig
from epigone.training.config import Training


@dataclass(frozen=True)
class Model:
    size: int = 3


REAL = Text("corpus", tokens=1000)
TOKENIZER = TrainedTokenizer("words", Text("corpus"))
EVALUATION = Evaluation(REAL, REAL)


def node(name: str, *written: str, teacher: str | None = None, size: int = 3, seed: int = 0) -> Node:
    text = tuple(Written(by=key, tokens=1000) for key in written) or (REAL,)
    return Node(name, 0, Model(size), TOKENIZER, Lesson(text, teacher=teacher), seed=seed)


def lineage(*nodes: Node) -> Lineage:
    return Lineage("test", nodes, EVALUATION)


def test_parents_come_first_whatever_the_given_order():
    family = lineage(node("c", "b@0", teacher="a@0"), node("b", "a@0"), node("a"))
    assert [n.key for n in family.order] == ["a@0", "b@0", "c@0"]
    assert family["c@0"].parents == (("a@0", "teacher"), ("b@0", "text"))
    assert family.ancestor("c@0").key == "a@0"


def test_identity_changes_with_own_config_and_with_any_ancestor_and_with_nothing_else():
    before = lineage(node("a"), node("b", "a@0"), node("c", "b@0"), node("other")).identities
    after = lineage(node("other"), node("a", size=4), node("b", "a@0"), node("c", "b@0")).identities
    assert {key for key in before if before[key] != after[key]} == {"a@0", "b@0", "c@0"}
    labelled = dataclasses.replace(node("a"), labels={"family": "x"})
    assert lineage(labelled).identities["a@0"] == before["a@0"]
    assert len(set(before.values())) == len(before)


def test_identity_is_the_same_in_another_process():
    code = (
        "from epigone.lineage import *; from epigone.regimes import fresh_share; from functools import partial;"
        "from epigone.identity import fingerprint;"
        "print(fingerprint((Written('a@0', 7), partial(fresh_share, share=.5))))"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert other == fingerprint((Written("a@0", 7), partial(regimes.fresh_share, share=0.5)))


def test_a_cycle_is_named():
    with pytest.raises(UserError, match=r"cycle: (a@0 -> b@0 -> a@0|b@0 -> a@0 -> b@0)"):
        lineage(node("a", "b@0"), node("b", "a@0"))


def test_a_missing_parent_names_the_nearest_node():
    with pytest.raises(UserError, match=r"'student@0' learns from 'teahcer@0'.*did you mean 'teacher@0'"):
        lineage(node("teacher"), node("student", teacher="teahcer@0"))


def test_two_nodes_of_one_key_are_refused():
    with pytest.raises(UserError, match="two nodes 'a@0'"):
        lineage(node("a"), node("a", size=9))


def test_unknown_node_names_the_nearest():
    with pytest.raises(UserError, match="did you mean 'teacher@0'"):
        lineage(node("teacher"))["techer@0"]


def test_seeds_fan_out_and_population_in_one_line_each():
    teachers = [node("t", size=1), node("u", size=2)]
    students = fan_out(teachers[0], repeat(node("s"), 3))
    assert [s.key for s in students] == ["s@1", "s@1.s1", "s@1.s2"]
    assert {s.lesson.teacher for s in students} == {"t@0"}
    crowd = population(node("p"), teachers, 5)
    assert [p.lesson.teacher for p in crowd] == ["t@0", "u@0", "t@0", "u@0", "t@0"]
    assert len(lineage(*teachers, *students, *crowd).identities) == 10


def test_regimes_take_what_they_say():
    root = node("n", seed=2)
    replaced = chain(root, 3, regimes.replace, name="r")
    assert [n.key for n in replaced] == ["r@1.s2", "r@2.s2", "r@3.s2"]
    assert [n.lesson.text[0].by for n in replaced] == ["n@0.s2", "r@1.s2", "r@2.s2"]
    accumulated = chain(root, 3, regimes.accumulate, name="a")[-1].lesson.text
    assert accumulated[0] == REAL
    assert [source.by for source in accumulated[1:]] == ["n@0.s2", "a@1.s2", "a@2.s2"]
    fresh = chain(root, 3, partial(regimes.fresh_share, share=0.1), name="f")
    assert [n.lesson.text[0] for n in fresh] == [
        dataclasses.replace(REAL, skip=s, tokens=100) for s in (1000, 1100, 1200)
    ]
    assert {sum(source.tokens for source in n.lesson.text) for n in fresh} == {1000}
    assert {n.labels["regime"] for n in fresh} == {"fresh share"}


def sources(regime, generations=3):
    """What the generations of a chain read: (who wrote it, tokens of it that are read), or (None, first, tokens)."""
    return [
        [(s.by, s.size) if isinstance(s, Written) else (None, s.skip, s.size) for s in n.lesson.text]
        for n in chain(node("n"), generations, regime, name="r")
    ]


def test_every_regime_reads_what_its_name_says():
    real = (None, 0, 1000)
    assert sources(regimes.replace_grown) == [[("n@0", 2000)], [("r@1", 3000)], [("r@2", 4000)]]
    third = [(None, 0, 333), ("n@0", 333), ("r@1", 333)]
    assert sources(regimes.accumulate_subsample)[:2] == [[(None, 0, 500), ("n@0", 500)], third]
    window = sources(partial(regimes.sliding_window, last=2))
    assert window == [[real, ("n@0", 1000)], [("n@0", 1000), ("r@1", 1000)], [("r@1", 1000), ("r@2", 1000)]]
    fixed = sources(partial(regimes.fixed_share, share=0.2))
    assert fixed == [[(None, 0, 200), (by, 800)] for by in ("n@0", "r@1", "r@2")]
    assert sources(regimes.real_only) == [[(None, 1000 * g, 1000)] for g in (1, 2, 3)]


def test_a_part_of_a_text_is_drawn_of_the_text_that_is_there():
    part = chain(node("n"), 2, regimes.accumulate_subsample, name="r")[1].lesson.text
    assert part[0].whole == REAL
    assert part[1].whole == Written(by="n@0", tokens=1000)
    assert fingerprint(part[1]) != fingerprint(part[1].whole)


@pytest.mark.parametrize("share", [0.0, 1.0, -0.5])
@pytest.mark.parametrize("regime", [regimes.fixed_share, regimes.fresh_share])
def test_a_share_lies_between_none_and_all(regime, share):
    with pytest.raises(UserError, match="a share of real text lies between 0 and 1"):
        sources(partial(regime, share=share))


def test_a_window_has_a_text():
    with pytest.raises(UserError, match="last=0"):
        sources(partial(regimes.sliding_window, last=0))


@pytest.mark.parametrize("kind", [Text, partial(Written, tokens=10)])
def test_no_more_is_drawn_than_there_is(kind):
    with pytest.raises(UserError, match="subsample=11 of tokens=10"):
        kind("x", tokens=10, subsample=11)


def test_successors_take_turns_begin_warm_and_learn_scores():
    small, large = node("small", size=1), node("large", size=9)
    turns = chain(node("n"), 3, regimes.replace, name="r", successors=(small, large))
    assert [n.model.size for n in turns] == [1, 9, 1]
    assert [n.lesson.text[0].by for n in turns] == ["n@0", "r@1", "r@2"]
    warm = chain(node("n"), 2, regimes.replace, name="r", warm=True, scores=True)
    assert [(n.lesson.start_from, n.lesson.teacher) for n in warm] == [("n@0", "n@0"), ("r@1", "r@1")]
    cold = chain(node("n"), 2, regimes.replace, name="r")
    assert [(n.lesson.start_from, n.lesson.teacher) for n in cold] == [(None, None)] * 2


def test_a_population_names_nodes_of_its_lineage_each_once():
    few = (node("a"), node("b"))
    kept = Population("both", ("a@0", "b@0"), {"teachers": 2})
    assert Lineage("test", few, EVALUATION, populations=(kept,)).identities == lineage(*few).identities
    with pytest.raises(UserError, match="no node 'c@0'"):
        Lineage("test", few, EVALUATION, populations=(Population("p", ("a@0", "c@0")),))
    with pytest.raises(UserError, match="two populations 'both'"):
        Lineage("test", few, EVALUATION, populations=(kept, kept))
    for members in (("a@0",), ("a@0", "a@0"), ()):
        with pytest.raises(UserError, match="two nodes or more, each once"):
            Population("p", members)


@pytest.mark.parametrize("wrong", [{"order": ("a@1",)}, {"order": ("a@1", "a@1")}, {"factor": 0.0}])
def test_a_claim_orders_two_groups_or_more(wrong):
    with pytest.raises(UserError, match="name two groups or more, each once, and a positive factor"):
        Claim(**{"says": "a < b", "source": "somebody", "order": ("a@1", "b@1")} | wrong)


def test_a_chain_needs_real_text_of_known_size():
    with pytest.raises(UserError, match="whole corpus"):
        chain(dataclasses.replace(node("n"), lesson=Lesson((Text("corpus"),))), 1, regimes.replace, name="r")
    with pytest.raises(UserError, match="starts at a node that learned real text"):
        chain(node("n", "a@0"), 1, regimes.replace, name="r")


def test_a_config_comes_back_from_its_record():
    value = (Written("a@0", 7), partial(regimes.fresh_share, share=0.5), {"k": (1, None, 2.5)}, regimes.replace)
    back = restore(canonical(value))
    assert canonical(back) == canonical(value)
    assert back[0] == value[0]
    assert back[3] is regimes.replace


@pytest.mark.parametrize(
    "foreign",
    ["os:system", "builtins:eval", "epigone.store:os.system", "epigone.store:os", "epigone.cli:main", "epigone.cli:x"],
)
def test_a_record_cannot_name_code_outside_epigone(foreign):
    with pytest.raises(Fault, match="a record names"):
        restore({"type": foreign, "command": "false"})
    with pytest.raises(Fault, match="a record names"):
        restore({"partial": foreign.replace("epigone.cli:main", "os:x"), "args": []})


def test_what_has_no_stable_identity_is_refused():
    for value in (lambda x: x, object(), {1, 2}):
        with pytest.raises(UserError, match="a config cannot hold"):
            fingerprint(value)


@pytest.mark.parametrize(
    ("config", "known"),
    [
        (DecoderConfig(), "2b32ce012b433fd2"),
        (Training(), "50dba4c19255a4e0"),
        (Objective(), "a04e92002f958004"),
        (Lesson(), "8026e7cb9ef8f1b0"),
    ],
    ids=["model", "training", "objective", "lesson"],
)
def test_a_field_that_comes_later_changes_no_identity_where_it_is_not_set(config, known):
    """Nodes that were grown stay done, and what draws its seed from a config draws the same: see WHERE_SET."""
    assert fingerprint(config) == known
