"""What does not fit is refused before step 0, with both names and sizes."""

from dataclasses import dataclass, field
from typing import Any

import pytest

from epigone.errors import UserError
from epigone.lessons.objective import TEXT_ALONE, Objective
from epigone.teachers import Signal, check_compatible


@dataclass
class Fake:
    vocab_size: int = 100
    tokens: int | None = None
    tokenizer_identity: str = "aaaa"
    tokenizer_name: str = "bible"
    signal: Signal = Signal.DENSE_LOGITS
    logits: Any = field(default=None)


def check(objective, teacher):
    check_compatible(objective, teacher, vocab_size=100, tokenizer_identity="aaaa", tokenizer_name="novel")


def test_what_fits_passes():
    check(Objective(), Fake())
    check(Objective(hard_weight=0.5), Fake())
    check(TEXT_ALONE, None)
    check_compatible(Objective(), Fake(tokenizer_identity="any"), vocab_size=100)
    check(Objective(), Fake(vocab_size=128, tokens=100))
    check(Objective(), Fake(vocab_size=90, tokens=90))


@pytest.mark.parametrize(
    ("objective", "teacher", "message"),
    [
        (Objective(), None, "needs a teacher"),
        (Objective(hard_weight=0.5), None, "hard_weight=0.5"),
        (TEXT_ALONE, Fake(), "text alone"),
        (Objective(), Fake(signal=Signal.TEXT_ONLY), "text only"),
        (Objective(), Fake(vocab_size=128), r"teacher vocabulary 128 != student vocabulary 100.*'bible', 'novel'"),
        (Objective(), Fake(vocab_size=128, tokens=110), "teacher vocabulary 128 != student vocabulary 100"),
        (Objective(), Fake(vocab_size=128, tokens=100, tokenizer_identity="b"), "128 != student vocabulary 100"),
        (Objective(), Fake(tokenizer_identity="bbbb"), r"size 100.*'bible', 'novel'.*bbbb and aaaa"),
    ],
)
def test_what_does_not_fit_is_named(objective, teacher, message):
    with pytest.raises(UserError, match=message):
        check(objective, teacher)
