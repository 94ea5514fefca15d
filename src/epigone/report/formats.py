"""Numbers as a reader wants them: short, with a unit, and "inf" where they are infinite."""

import math

_UNITS = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def count(value: float | None) -> str:
    """1234567 -> "1.23 M"; absent -> an empty string."""
    if value is None:
        return ""
    if not math.isfinite(value):
        return str(value)
    for size, unit in _UNITS:
        if abs(value) >= size * 0.9995:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g}" if value != int(value) else str(int(value))


def real(value: float | None) -> str:
    """Few digits, no exponent where that is readable: 0.123, 7.36, 61.2, 467.8, 12 345; absent -> an empty string."""
    if value is None:
        return ""
    if not math.isfinite(value):
        return str(value)
    size = abs(value)
    if size >= 1e6:
        return count(value)
    if size >= 1000:
        return f"{value:,.0f}".replace(",", "\u202f")
    if size >= 10:
        return f"{value:.1f}"
    if size >= 1:
        return f"{value:.2f}"
    return f"{value:.2g}" if size < 0.1 else f"{value:.3f}"


def probability(value: float) -> str:
    """Three decimals, so that numbers in a list stand below each other: 0.120, <0.001."""
    return f"{value:.3f}" if value >= 0.0005 or value == 0 else "<0.001"


def duration(seconds: float | None) -> str:
    """75.2 -> "1 min 15 s"; absent -> an empty string."""
    if seconds is None:
        return ""
    if not math.isfinite(seconds):
        return str(seconds)
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
