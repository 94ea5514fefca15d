"""Whole numbers in as few bits as they need, one after the other, lowest bit first."""

import numpy as np

from epigone.errors import Fault


def width_of(values: int) -> int:
    """Bits that tell `values` different numbers apart: ceil(log2(values)), at least 1."""
    return max(1, (values - 1).bit_length())


def pack(values: np.ndarray, width: int) -> bytes:
    """Numbers below 2^width, in `width` bits each; the last byte is filled up with zeros."""
    bits = (values.ravel().astype(np.uint32)[:, None] >> np.arange(width, dtype=np.uint32)) & 1
    return np.packbits(bits.astype(np.uint8), bitorder="little").tobytes()


def packed_size(count: int, width: int) -> int:
    """Bytes of `count` numbers of `width` bits."""
    return -(-count * width // 8)


class Reader:
    """Reads what `pack` wrote, one part after the other. Raises Fault where bytes are missing."""

    def __init__(self, data: bytes):
        # Four more bytes, so that the last number can be read as the part of a whole word.
        self._bytes = np.frombuffer(data + bytes(4), np.uint8)
        self._size, self._at = len(data), 0

    def numbers(self, count: int, width: int) -> np.ndarray:
        """The next `count` numbers of `width` bits (25 at most), int32 [count]."""
        part = self._part(packed_size(count, width), more=4)
        words = np.ndarray((len(part) - 3,), "<u4", part.tobytes(), strides=(1,))
        first = np.arange(count, dtype=np.int64) * width
        return ((words[first >> 3] >> (first & 7).astype(np.uint32)) & np.uint32(2**width - 1)).astype(np.int32)

    def runs(self, count: int) -> np.ndarray:
        """The next `count` bits, as booleans."""
        part = self._part(packed_size(count, 1))
        return np.unpackbits(part, count=count, bitorder="little").astype(bool)

    def finish(self) -> None:
        """All has been read."""
        if self._at != self._size:
            raise Fault(f"{self._size - self._at} bytes are left over")

    def _part(self, size: int, more: int = 0) -> np.ndarray:
        if self._at + size > self._size:
            raise Fault(f"{self._at + size} bytes are needed, {self._size} are there")
        part = self._bytes[self._at : self._at + size + more]
        self._at += size
        return part
