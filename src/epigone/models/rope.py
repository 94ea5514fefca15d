"""Frequencies of rotary positions, and the published ways to stretch them to longer texts.

Every way is a frozen dataclass with

    frequencies(size, theta) -> (inverse frequencies float32 [size / 2], factor on cosines and sines)

where `size` is the number of features that are rotated: feature i turns with feature i + size / 2, by position times
inverse frequency i. The formulas are those of `transformers.modeling_rope_utils`, in float32 as there.
"""

import math
from dataclasses import dataclass

import numpy as np

from epigone.errors import UserError


def frequencies(size: int, theta: float) -> np.ndarray:
    """theta^(-2i / size), float32 [size / 2] (Su et al. 2021)."""
    return (1.0 / wavelengths(size, theta)).astype(np.float32)


def wavelengths(size: int, theta: float) -> np.ndarray:
    """theta^(2i / size), float32 [size / 2]: positions in one turn, over 2 pi."""
    return np.float32(theta) ** (np.arange(0, size, 2, dtype=np.float32) / np.float32(size))


@dataclass(frozen=True)
class LinearScaling:
    """Every frequency is divided by one factor (Chen et al. 2023, position interpolation).

    Attributes:
        factor: by how much positions are squeezed.
    """

    factor: float

    def frequencies(self, size: int, theta: float) -> tuple[np.ndarray, float]:
        """theta^(-2i / size) / factor, and 1."""
        return frequencies(size, theta) / np.float32(self.factor), 1.0


@dataclass(frozen=True)
class Llama3Scaling:
    """Low frequencies are divided by the factor, high ones kept, and those between are blended (Llama 3.1).

    Attributes:
        factor: divisor of the low frequencies.
        low_frequency_factor: turns within the original length up to which a frequency is low.
        high_frequency_factor: turns within the original length from which a frequency is high.
        original_max_length: tokens of a row in the first training.
    """

    factor: float
    low_frequency_factor: float
    high_frequency_factor: float
    original_max_length: int

    def __post_init__(self) -> None:
        if self.high_frequency_factor <= self.low_frequency_factor:
            raise UserError(
                f"high_frequency_factor {self.high_frequency_factor} must be larger than "
                f"low_frequency_factor {self.low_frequency_factor}"
            )

    def frequencies(self, size: int, theta: float) -> tuple[np.ndarray, float]:
        """f (1 - s) / factor + f s with s = clip((turns - low) / (high - low), 0, 1), and 1."""
        plain = frequencies(size, theta)
        turns = self.original_max_length * plain / np.float32(2 * math.pi)
        spread = self.high_frequency_factor - self.low_frequency_factor
        smooth = np.clip((turns - self.low_frequency_factor) / spread, 0.0, 1.0)
        return ((1 - smooth) * plain / self.factor + smooth * plain).astype(np.float32), 1.0


@dataclass(frozen=True)
class YarnScaling:
    """Low frequencies are divided by the factor, high ones kept, with a linear ramp over the features between them.

    Source: Peng et al. 2023 (YaRN).

    Attributes:
        factor: divisor of the low frequencies.
        original_max_length: tokens of a row in the first training.
        beta_fast: turns within the original length from which a frequency is kept.
        beta_slow: turns within the original length up to which a frequency is divided.
        attention_factor: factor on cosines and sines; None for 0.1 ln(factor) + 1, or the ratio of the next two.
        mscale: weight of ln(factor) above the ratio line; read with mscale_all_dim alone.
        mscale_all_dim: weight of ln(factor) below it.
        truncate: round the ends of the ramp to whole features.
    """

    factor: float
    original_max_length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def frequencies(self, size: int, theta: float) -> tuple[np.ndarray, float]:
        """f r / factor + f (1 - r) with a ramp r over the features, and the attention factor."""
        plain = frequencies(size, theta)
        low, high = (self._feature(turns, size, theta) for turns in (self.beta_fast, self.beta_slow))
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, size - 1)
        width = high - low if high != low else 0.001
        ramp = np.clip((np.arange(size // 2, dtype=np.float32) - low) / width, 0.0, 1.0)
        return (plain / self.factor * ramp + plain * (1 - ramp)).astype(np.float32), self._attention_factor()

    def _feature(self, turns: float, size: int, theta: float) -> float:
        """The (fractional) feature that makes so many turns within the original length."""
        return size * math.log(self.original_max_length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    def _attention_factor(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        logarithm = 0.1 * math.log(self.factor) if self.factor > 1 else 0.0
        if self.mscale and self.mscale_all_dim:
            return (self.mscale * logarithm + 1) / (self.mscale_all_dim * logarithm + 1)
        return logarithm + 1


@dataclass(frozen=True)
class LongRopeScaling:
    """Each frequency has a divisor of its own, one for rows within the original length and one for longer ones.

    Source: Ding et al. 2024 (LongRoPE), as in Phi-3.

    Attributes:
        short_factors: divisors for rows of at most original_max_length positions.
        long_factors: divisors for longer rows.
        original_max_length: tokens of a row in the first training.
        factor: longest length over original_max_length; it sets the factor on cosines and sines.
        attention_factor: that factor; None for sqrt(1 + ln(factor) / ln(original_max_length)).
    """

    short_factors: tuple[float, ...]
    long_factors: tuple[float, ...]
    original_max_length: int
    factor: float
    attention_factor: float | None = None

    def frequencies(self, size: int, theta: float, long: bool = False) -> tuple[np.ndarray, float]:
        """theta^(-2i / size) / divisor_i, and sqrt(1 + ln(factor) / ln(original_max_length)).

        Raises UserError when there are not size / 2 divisors.
        """
        divisors = np.array(self.long_factors if long else self.short_factors, np.float32)
        if len(divisors) != size // 2:
            raise UserError(f"{len(divisors)} longrope factors for {size} rotated features: give {size // 2}")
        return (1.0 / (divisors * wavelengths(size, theta))).astype(np.float32), self._attention_factor()

    def _attention_factor(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        return math.sqrt(1 + math.log(self.factor) / math.log(self.original_max_length)) if self.factor > 1 else 1.0


RopeScaling = LinearScaling | Llama3Scaling | YarnScaling | LongRopeScaling
