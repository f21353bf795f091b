"""The Haar transform of one level: neighbours become their sum and their difference, over the square root of two."""

from __future__ import annotations

import math

import torch


def haar(values: torch.Tensor, dim: int) -> torch.Tensor:
    """Return ``(a + b) / sqrt(2)`` and ``(a - b) / sqrt(2)`` where the neighbours a, b stand, at 2 i and 2 i + 1.

    The low band stands at even places, the high band at odd ones; a last value without a neighbour is unchanged and
    belongs to the low band. The transform is orthonormal, differentiable, and its own inverse. In float32 a value is
    rounded twice, in an order that no device changes.
    """
    length = values.shape[dim]
    pairs = values.narrow(dim, 0, length // 2 * 2).unflatten(dim, (length // 2, 2))
    inner = dim % values.dim() + 1
    a, b = pairs.unbind(inner)
    bands = torch.stack([(a + b) * math.sqrt(0.5), (a - b) * math.sqrt(0.5)], dim=inner).flatten(inner - 1, inner)
    return bands if length % 2 == 0 else torch.cat([bands, values.narrow(dim, length - 1, 1)], dim=dim)
