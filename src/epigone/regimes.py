"""What each generation learns from: one function per data regime.

A regime takes the real text of generation 0 and the texts that generations 0, 1, ..., g - 1 wrote (each as long as the
real one) and gives the sources of generation g. To add one, write such a function and pass it to `families.chain`.
"""

from collections.abc import Sequence
from dataclasses import replace as change

from epigone.lineage import Text, Written


def replace(real: Text, written: Sequence[Written]) -> tuple[Text | Written, ...]:
    """Only the text of the generation before (Shumailov et al. 2024)."""
    return (written[-1],)


def accumulate(real: Text, written: Sequence[Written]) -> tuple[Text | Written, ...]:
    """The real text and everything written since; the data grow (Gerstgrasser et al. 2024)."""
    return (real, *written)


def fresh_share(real: Text, written: Sequence[Written], share: float = 0.1) -> tuple[Text | Written, ...]:
    """Constant size: `share` of it real text that no generation has seen, the rest from the generation before."""
    fresh = round(share * written[-1].tokens)
    used = real.skip + (real.tokens or 0) + (len(written) - 1) * fresh
    return (change(real, skip=used, tokens=fresh), change(written[-1], tokens=written[-1].tokens - fresh))
