"""Items put together with their neighbours up to a size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")


def neighbours_up_to(limit: int, items: Sequence[T], size: Callable[[T], int]) -> list[list[T]]:
    """Return `items` in their order, cut so that no part's total size is above `limit`, unless one item alone is.

    Without items there is one empty part.
    """
    parts: list[list[T]] = [[]]
    filled = 0
    for item in items:
        if parts[-1] and filled + size(item) > limit:
            parts.append([])
            filled = 0
        parts[-1].append(item)
        filled += size(item)
    return parts
