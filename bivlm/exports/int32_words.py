"""Codes of 1 to 8 bits in rows of int32 words, as the format ``pack-quantized`` of compressed-tensors has them.

A row is one stream of bits, the lowest of the first code first, in little-endian words; zeros fill the last word.
"""

from __future__ import annotations

import numpy as np

_CODES = 8  # that many codes of b bits are b whole bytes


def row_words(count: int, bits: int) -> int:
    """Return the words of a row of `count` codes."""
    return -(-count * bits // 32)


def pack_words(codes_RC: np.ndarray, bits: int) -> np.ndarray:
    """Return words, little-endian int32 (rows, words), of uint8 codes (rows, count), each below 2^bits."""
    rows, count = codes_RC.shape
    padded = np.pad(codes_RC, ((0, 0), (0, -count % _CODES))).reshape(rows, -1, _CODES)
    joined = np.zeros(padded.shape[:2], "<u8")
    for place in range(_CODES):
        joined |= padded[..., place].astype(np.uint64) << np.uint64(place * bits)
    stream = joined.view(np.uint8).reshape(rows, -1, 8)[..., :bits].reshape(rows, -1)
    words = np.zeros((rows, row_words(count, bits)), "<i4")
    length = min(stream.shape[1], words.view(np.uint8).shape[1])
    words.view(np.uint8)[:, :length] = stream[:, :length]
    return words
