"""Numbers of an objective that change with the steps: a temperature that cools, hard labels that fade in or out."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from epigone.errors import UserError

Schedule = Callable[[jax.Array], jax.Array]
"""Of the number of steps that are done, from 0; traced. A function that has a name, or a frozen dataclass."""


@dataclass(frozen=True)
class Linear:
    """From start to end on a straight line: start + (end - start) min(1, max(0, (step - after) / steps)).

    Attributes:
        start: the value up to step `after`.
        end: the value from step `after + steps` on.
        steps: between the two.
        after: steps before it begins.
    """

    start: float
    end: float
    steps: int
    after: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.after < 0:
            raise UserError(f"{type(self).__name__}: steps={self.steps} (1 or more), after={self.after} (0 or more)")

    def __call__(self, step: jax.Array) -> jax.Array:
        """The value at a step."""
        share = jnp.clip((step - self.after) / self.steps, 0.0, 1.0)
        return self.start + (self.end - self.start) * share


@dataclass(frozen=True)
class Cosine(Linear):
    """From start to end on half a cosine: flat at both ends."""

    def __call__(self, step: jax.Array) -> jax.Array:
        """The value at a step."""
        share = jnp.clip((step - self.after) / self.steps, 0.0, 1.0)
        return self.start + (self.end - self.start) * 0.5 * (1.0 - jnp.cos(jnp.pi * share))


def at_step(value: float | Schedule, step: jax.Array) -> jax.Array:
    """A number, or that of a schedule."""
    return jnp.asarray(value(step) if callable(value) else value, jnp.float32)


def ends(value: float | Schedule) -> tuple[float, ...]:
    """The numbers between which it lies, as far as that is known."""
    if isinstance(value, Linear):
        return value.start, value.end
    return () if callable(value) else (value,)
