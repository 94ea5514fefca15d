"""How one layer of a student is held against one of its teacher: by states, by relations of tokens, by contrast.

A kind is a frozen dataclass with the protocol `Kind`; its loss is a function of `epigone.lessons.hidden`. A fork adds
one more of them, or another distance of `States`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import jax

from epigone.errors import UserError
from epigone.lessons.hidden import hidden_mse, info_nce, relation_kl


class Sizes(Protocol):
    """Of a model: layers, features, query heads, key heads, features of a head."""

    @property
    def L(self) -> int: ...
    @property
    def D(self) -> int: ...
    @property
    def N(self) -> int: ...
    @property
    def K(self) -> int: ...
    @property
    def H(self) -> int: ...


class Kind(Protocol):
    """How one layer of the student is held against one of the teacher; a frozen dataclass.

    Attributes:
        of_heads: whether it is given (queries, keys, values), or else the states.
        name: what the curve of a record calls it.
    """

    of_heads: ClassVar[bool]

    @property
    def name(self) -> str: ...

    def check(self, student: Sizes, teacher: Sizes) -> None:
        """Raises UserError for sizes that do not fit."""

    def projections(self, student: Sizes, teacher: Sizes) -> dict[str, tuple[int, int]]:
        """The matrices that it learns for a pair of layers: name, which ends in the axis letters, and shape."""

    def flops(self, student: Sizes, teacher: Sizes, length: int) -> float:
        """Floating-point operations of the products for one token in training, of a row of this length."""

    def __call__(self, projections: Mapping[str, Any], student: Any, teacher: Any, segments_BT: Any) -> Any:
        """[B, T], float32."""


@dataclass(frozen=True)
class States:
    """The states of two layers, the student's through a learned projection, which begins as the identity if it can.

    Attributes:
        distance: `hidden_mse` or `hidden_cosine`, or another function of student, teacher and projection.
    """

    distance: Callable[..., jax.Array] = hidden_mse
    of_heads: ClassVar[bool] = False

    @property
    def name(self) -> str:
        return str(getattr(self.distance, "__name__", "states"))

    def check(self, student: Sizes, teacher: Sizes) -> None:
        """All widths fit: there is a projection."""

    def projections(self, student: Sizes, teacher: Sizes) -> dict[str, tuple[int, int]]:
        """From the student's width to the teacher's."""
        return {"student_DE": (student.D, teacher.D)}

    def flops(self, student: Sizes, teacher: Sizes, length: int) -> float:
        """The projection, and its two gradients."""
        return 6 * student.D * teacher.D

    def __call__(self, projections: Mapping[str, Any], student: Any, teacher: Any, segments_BT: Any) -> Any:
        return self.distance(student, teacher, projections["student_DE"])


PARTS = ("queries", "keys", "values")
"""Of a layer's heads, in the order in which they are given."""


@dataclass(frozen=True)
class Relations:
    """How the tokens of a text relate in one layer, by the sum of `relation_kl` over kinds of relations (MiniLM).

    Attributes:
        of: pairs of queries, keys and values whose products are the relations. Those of a part with itself are MiniLMv2
            (Wang et al. 2021); (queries, keys) and (values, values), in the last layer and with heads=None, are MiniLM
            (Wang et al. 2020).
        heads: relation heads into which the features of all heads are divided anew; None for the heads as they are.
    """

    of: tuple[tuple[str, str], ...] = (("queries", "queries"), ("keys", "keys"), ("values", "values"))
    heads: int | None = None
    of_heads: ClassVar[bool] = True
    name: ClassVar[str] = "relations"

    def __post_init__(self) -> None:
        if not self.of or any(len(pair) != 2 or not set(pair) <= set(PARTS) for pair in self.of):
            raise UserError(f"relations: of={self.of} must be pairs of {', '.join(PARTS)}")
        # Keys that serve several queries can be repeated, values to the left of queries cannot be taken apart.
        if any(right == "queries" and left != right for left, right in self.of):
            raise UserError(f"relations: of={self.of}: name queries first in a pair")
        if self.heads is not None and self.heads < 1:
            raise UserError(f"relations: heads={self.heads} must be at least 1, or None for the heads as they are")

    def check(self, student: Sizes, teacher: Sizes) -> None:
        """Heads must divide, or be as many."""
        for left, _ in self.of:
            mine, theirs = (sizes.N if left == "queries" else sizes.K for sizes in (student, teacher))
            features = {"student": mine * student.H, "teacher": theirs * teacher.H}
            for whose, size in features.items():
                if self.heads is not None and size % self.heads:
                    raise UserError(
                        f"relations: heads={self.heads} does not divide the {size} features of all {left} of the "
                        f"{whose}: choose a divisor of {' and '.join(map(str, features.values()))}"
                    )
            if self.heads is None and mine != theirs:
                raise UserError(
                    f"relations: the student has {mine} heads of {left} and the teacher {theirs}: set heads to a "
                    f"divisor of {' and '.join(map(str, features.values()))}"
                )

    def projections(self, student: Sizes, teacher: Sizes) -> dict[str, tuple[int, int]]:
        """None."""
        return {}

    def flops(self, student: Sizes, teacher: Sizes, length: int) -> float:
        """Products of a token with all before it, and of the student's two gradients."""
        seen = (length + 1) / 2
        widths = [tuple((s.N if left == "queries" else s.K) * s.H for s in (student, teacher)) for left, _ in self.of]
        return sum(2 * seen * (3 * mine + theirs) for mine, theirs in widths)

    def __call__(self, projections: Mapping[str, Any], student: Any, teacher: Any, segments_BT: Any) -> Any:
        places = [(PARTS.index(left), PARTS.index(right)) for left, right in self.of]
        pairs = [[(heads[i], heads[j]) for heads in (student, teacher)] for i, j in places]
        return sum(relation_kl(mine, theirs, segments_BT, self.heads) for mine, theirs in pairs)


@dataclass(frozen=True)
class Contrast:
    """A token's state in the student nearer to its own in the teacher than to those of other tokens: `info_nce`.

    Attributes:
        size: features of the space to which both are projected.
        temperature: divides the cosines.
        negatives: tokens on either side that are told apart, the nearest ones; None for all of the row.
    """

    size: int = 128
    temperature: float = 0.07
    negatives: int | None = None
    of_heads: ClassVar[bool] = False
    name: ClassVar[str] = "contrast"

    def __post_init__(self) -> None:
        least = min(self.size, 1 if self.negatives is None else self.negatives)
        if least < 1 or not self.temperature > 0.0:
            raise UserError(
                f"contrast: size={self.size} and negatives={self.negatives} must be at least 1, temperature="
                f"{self.temperature} positive"
            )

    def check(self, student: Sizes, teacher: Sizes) -> None:
        """All widths fit: both are projected."""

    def projections(self, student: Sizes, teacher: Sizes) -> dict[str, tuple[int, int]]:
        """From both widths to the common one."""
        return {"student_DC": (student.D, self.size), "teacher_DC": (teacher.D, self.size)}

    def flops(self, student: Sizes, teacher: Sizes, length: int) -> float:
        """Projections, of which the teacher's gives no gradient to its states, and products with all of the row."""
        return self.size * (6 * student.D + 4 * teacher.D + 6 * length)

    def __call__(self, projections: Mapping[str, Any], student: Any, teacher: Any, segments_BT: Any) -> Any:
        weights = projections["student_DC"], projections["teacher_DC"]
        return info_nce(student, teacher, *weights, segments_BT, self.temperature, self.negatives)
