"""What a run says where there is no terminal: one line a node, and where one goes on."""

import io

from rich.console import Console

from epigone.lessons.objective import TEXT_ALONE
from epigone.lineage import Lesson, Node
from epigone.models.ngram import NGram
from epigone.training.metrics import StepReport
from epigone.view import Terminal


def said(*steps):
    """What is printed for a node whose training tells of these steps."""
    console = Console(file=io.StringIO(), width=200)
    node = Node("student", 1, NGram(), None, Lesson((), objective=TEXT_ALONE))
    with Terminal("a run", {node.key: 1.0}, console) as view:
        view.start(node)
        view.stage("train", 60)
        for step in steps:
            view.step(StepReport(step, 60, 2.0, 64 * step, 100.0, 1.0))
    return console.file.getvalue().splitlines()


def test_a_node_that_goes_on_says_from_where_once():
    assert said(31, 32, 33) == ["  student@1 train: goes on at step 31 of 60"]
    assert said(1, 2, 3) == []
