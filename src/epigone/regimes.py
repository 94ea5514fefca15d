"""What each generation learns from: one function per data regime.

A regime takes the real text of generation 0 and the texts that generations 0, 1, ..., g - 1 wrote (each as long as the
real one, N tokens) and gives the sources of generation g. To add one, write such a function and pass it to
`families.chain`.
"""

from collections.abc import Sequence
from dataclasses import replace as change

from epigone.errors import UserError
from epigone.lineage import Text, Written

Sources = tuple[Text | Written, ...]


def replace(real: Text, written: Sequence[Written]) -> Sources:
    """Only the text of the generation before (Shumailov et al. 2024)."""
    return (written[-1],)


def replace_grown(real: Text, written: Sequence[Written]) -> Sources:
    """Only the text of the generation before, which writes as much as `accumulate` has: (g + 1) N tokens.

    Gerstgrasser et al. 2024: what accumulating gains is not only that there are more data.
    """
    return (change(written[-1], tokens=(len(written) + 1) * written[-1].tokens),)


def accumulate(real: Text, written: Sequence[Written]) -> Sources:
    """The real text and everything written since; the data grow (Gerstgrasser et al. 2024)."""
    return (real, *written)


def accumulate_subsample(real: Text, written: Sequence[Written]) -> Sources:
    """Constant size: an equal part of the real text and of everything written since, drawn anew each generation.

    Kazdan et al. 2024 draw from all of it at once, so that the parts are equal on average.
    """
    part = round(written[-1].tokens / (len(written) + 1))
    return (change(real, subsample=part), *(change(text, subsample=part) for text in written))


def sliding_window(real: Text, written: Sequence[Written], last: int = 3) -> Sources:
    """The last texts, as many as `last`; the real one is the first of all. The data grow until the window is full."""
    _check_whole(last, "last")
    texts: Sources = (real, *written)
    return texts[-last:]


def fixed_share(real: Text, written: Sequence[Written], share: float = 0.1) -> Sources:
    """Constant size: `share` of it real, the same documents in every generation, the rest from the generation before.

    The fixed real data of Alemohammad et al. 2024, at the size of Shumailov et al. 2024.
    """
    kept = _part(share, written[-1].tokens)
    return (change(real, tokens=kept), change(written[-1], tokens=written[-1].tokens - kept))


def fresh_share(real: Text, written: Sequence[Written], share: float = 0.1) -> Sources:
    """Constant size: `share` of it real text that no generation has seen, the rest from the generation before."""
    fresh = _part(share, written[-1].tokens)
    used = real.skip + (real.tokens or 0) + (len(written) - 1) * fresh
    return (change(real, skip=used, tokens=fresh), change(written[-1], tokens=written[-1].tokens - fresh))


def real_only(real: Text, written: Sequence[Written]) -> Sources:
    """The control: N tokens of real text that no generation has seen. Whatever changes here, no copy is the cause."""
    return (change(real, skip=real.skip + len(written) * (real.tokens or 0)),)


def _part(share: float, tokens: int) -> int:
    part = round(share * tokens)
    if not 0 < part < tokens:
        raise UserError(f"share={share:g} of {tokens} tokens: a share of real text lies between 0 and 1")
    return part


def _check_whole(value: int, name: str) -> None:
    if value < 1:
        raise UserError(f"{name}={value}: it must be 1 or more")
