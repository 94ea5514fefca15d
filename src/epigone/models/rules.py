"""Over which axes of the mesh each axis of an array is cut: the rules of one model. JAX comes with their use."""

from dataclasses import dataclass
from typing import Any

from epigone.errors import UserError

MeshAxes = tuple[str, ...]


@dataclass(frozen=True)
class Sharding:
    """The mesh axes over which each logical axis is cut; none leaves it whole. Letters are those of the shape suffixes.

    Attributes:
        B: mesh axes of the batch.
        E: mesh axes of the experts.
        N: mesh axes of the query heads.
        K: mesh axes of the key and value heads.
        F: mesh axes of the feed-forward features.
        V: mesh axes of the vocabulary.
        D: mesh axes of the model features in weights; activations keep D whole.
    """

    B: MeshAxes = ("data", "fsdp", "expert")
    E: MeshAxes = ("expert",)
    N: MeshAxes = ("tensor",)
    K: MeshAxes = ("tensor",)
    F: MeshAxes = ("tensor",)
    V: MeshAxes = ("tensor",)
    D: MeshAxes = ("fsdp",)

    def weight(self, letters: str) -> Any:
        """How a weight with these axes is stored, e.g. `LDNH`: a PartitionSpec."""
        return self._spec(letters, kept=letters)

    def gathered(self, letters: str) -> Any:
        """How the same weight is used: D is whole, the rest stays cut."""
        return self._spec(letters, kept=letters.replace("D", ""))

    def activation(self, letters: str) -> Any:
        """How an activation with these axes lies, e.g. `BTNH`: like a weight, with D whole."""
        return self._spec(letters, kept=letters.replace("D", ""))

    def _spec(self, letters: str, kept: str) -> Any:
        from jax.sharding import PartitionSpec

        placed: dict[str, str] = {}
        spec: list[MeshAxes | None] = []
        for letter in letters:
            axes: MeshAxes = getattr(self, letter, ()) if letter in kept else ()
            for axis in axes:
                if axis in placed:
                    raise UserError(
                        f"logical axes {placed[axis]} and {letter} of an array {letters} are both on mesh axis "
                        f"'{axis}': give each its own in Sharding, or none"
                    )
                placed[axis] = letter
            spec.append(axes or None)
        return PartitionSpec(*spec)
