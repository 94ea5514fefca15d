"""Text that is shown while it is written: no half characters, and in the end exactly what is decoded at once."""

from collections.abc import Callable, Sequence

import numpy as np

from epigone.data.vocabularies import UNKNOWN


class StreamDecoder:
    """Text for ids that come bit by bit: the pieces of `add` and `end`, one after the other, are the text of all ids.

    Everything is decoded again at every piece, since a decoder may look back as far as it likes (quotation marks do,
    and runs of bytes). That is nothing beside what it costs to write the ids.

    Args:
        decode: ids to text.
        may_change: whether an id is written in another way when others follow it, as one byte of a character.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], may_change: Callable[[int], bool]):
        self._decode, self._may_change = decode, may_change
        self._ids: list[int] = []
        self._shown = 0

    def add(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text that has become certain with these ids."""
        self._ids += [int(index) for index in ids]
        certain = len(self._ids)
        while certain and self._may_change(self._ids[certain - 1]):
            certain -= 1
        # The first bytes of a character are decoded as U+FFFD until the others come.
        return self._news(self._decode(self._ids[:certain]).rstrip(UNKNOWN))

    def end(self) -> str:
        """The rest of the text; after that, another may begin."""
        rest = self._news(self._decode(self._ids))
        self._ids, self._shown = [], 0
        return rest

    def _news(self, text: str) -> str:
        news = text[self._shown :]
        self._shown = max(self._shown, len(text))
        return news
