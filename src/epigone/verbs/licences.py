"""The licences that come down to a model from its ancestors' weights and from every text, and the one word for them."""

import re
from collections.abc import Iterable
from typing import NamedTuple

PERMISSIVE = (
    "public domain", "unlicense", "cc0-1.0", "0bsd", "mit-0", "mit", "bsd-2-clause", "bsd-3-clause", "isc", "zlib",
    "apache-2.0", "cc-by-3.0", "cc-by-4.0", "odc-by",
)  # fmt: skip
"""Licences that let a model be passed on under any of the later ones, from what asks least to what asks most."""

OTHERS = frozenset(
    (
        "gpl-2.0", "gpl-3.0", "lgpl-3.0", "agpl-3.0", "mpl-2.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "cc-by-nc-4.0",
        "cc-by-nc-sa-4.0", "cc-by-nc-nd-4.0", "openrail", "bigscience-openrail-m", "gemma", "llama2", "llama3",
        "llama3.1", "llama3.2", "llama3.3", "llama4",
    )
)  # fmt: skip
"""Further licences by the name that the Hub has for them; a chain has one of these only where all of it has it."""

_FILLING = {"the", "a", "license", "licence", "licensed", "under", "version", "package", "text", "weights", "in"}
_SPELLINGS = {
    "apache-2": "apache-2.0",
    "apache2": "apache-2.0",
    "apache2.0": "apache-2.0",
    "apache-v2.0": "apache-2.0",
    "public-domain": "public domain",
    "public-domain-us": "public domain",
    "public-domain-united-states": "public domain",
    "cc0": "cc0-1.0",
    "bsd-2": "bsd-2-clause",
    "bsd-3": "bsd-3-clause",
    "llama-3.1": "llama3.1",
    "llama-3.2": "llama3.2",
    "llama-3.3": "llama3.3",
}


class Source(NamedTuple):
    """One thing that a model descends from: what it is, and what is said of its licence (None: nothing)."""

    what: str
    licence: str | None


def recognised(licence: str | None) -> list[str] | None:
    """The licences named in a text ("public domain; package MIT"), by their usual short names; None if one is unknown.

    A name alone counts: "BSD" or "a permissive licence" is not known, and neither is what nobody stated.
    """
    names = []
    for part in re.split(r";|,(?! *version)| and ", licence or "", flags=re.IGNORECASE):
        words = [word for word in re.findall(r"[a-z0-9.]+", part.lower()) if word not in _FILLING]
        name = "-".join(words)
        name = _SPELLINGS.get(name, name)
        if name not in PERMISSIVE and name not in OTHERS:
            return None
        names.append(name)
    return names


def summary(sources: Iterable[Source]) -> str:
    """The licence of a model that descends from all of these, as a model card's `license`; "other" where none is clear.

    Clear are two cases: everything has the same licence, or everything has a permissive one, of which the most
    demanding holds. The public domain alone gives "other" too: the Hub has no word for it.
    """
    found: set[str] = set()
    for source in sources:
        names = recognised(source.licence)
        if names is None:
            return "other"
        found |= set(names)
    if len(found) == 1 or (found and found <= set(PERMISSIVE)):
        chosen = max(found, key=lambda name: PERMISSIVE.index(name) if name in PERMISSIVE else 0)
        return "other" if chosen == "public domain" else chosen
    return "other"
