"""Do two ways to score weights choose the same ones, and do those lie together in a few columns or rows?"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from bivlm.errors import InputError

TOP_SHARE = 0.01  # of a layer's columns, or rows: one at least


def compare(masks: Mapping[str, ArrayLike]) -> dict[str, Any]:
    """Where the salient weights of one layer lie by each metric, ready for JSON.

    `masks` holds a boolean mask (M, N) of the salient weights for each metric. Returns::

        {"salient": {metric: share of all weights that are salient},
         "overlap": {"a|b": weights in both sets over weights in either (Jaccard), 0 to 1},
         "columns": {metric: share of its salient weights in the `TOP_SHARE` of columns that hold most of them},
         "rows": {metric: the same of rows}}

    Pairs stand in the order of `masks`. Sets of share p that know nothing of each other overlap by p / (2 - p). A share
    of nothing is None. Raises `InputError` naming a metric whose mask is not boolean, not a matrix or of another shape.
    """
    found = {metric: np.asarray(mask) for metric, mask in masks.items()}
    if not found:
        raise InputError("no masks to compare: expected a boolean mask (M, N) for each metric")
    shape = next(iter(found.values())).shape
    for metric, mask_MN in found.items():
        if mask_MN.dtype != np.bool_ or mask_MN.ndim != 2 or mask_MN.size == 0 or mask_MN.shape != shape:
            raise InputError(
                f"salient weights by {metric!r}: a mask of {mask_MN.dtype} {mask_MN.shape}; "
                "expected boolean masks (M, N), all of one shape"
            )
    return {
        "salient": {metric: float(mask_MN.mean()) for metric, mask_MN in found.items()},
        "overlap": {f"{a}|{b}": _jaccard(found[a], found[b]) for a, b in itertools.combinations(found, 2)},
        "columns": {metric: _share_of_top(mask_MN.sum(0)) for metric, mask_MN in found.items()},
        "rows": {metric: _share_of_top(mask_MN.sum(1)) for metric, mask_MN in found.items()},
    }


def _jaccard(a_MN: np.ndarray, b_MN: np.ndarray) -> float | None:
    either = np.count_nonzero(a_MN | b_MN)
    return np.count_nonzero(a_MN & b_MN) / either if either else None


def _share_of_top(counts: np.ndarray) -> float | None:
    """The share of the sum that the largest counts, `TOP_SHARE` of them, make up."""
    total = int(counts.sum())
    top = math.ceil(TOP_SHARE * len(counts))
    return int(np.partition(counts, -top)[-top:].sum()) / total if total else None
