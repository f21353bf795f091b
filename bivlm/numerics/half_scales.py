"""Scales on disk: float16 numbers times one power of two per tensor, so that weights of any size keep 11 bits."""

from __future__ import annotations

import math

import numpy as np
import torch

_LARGEST = float(np.finfo(np.float16).max)
EXPONENTS = range(-159, 128)  # from that of the smallest float32 number to the largest power of two that is one


def exponent_of(largest: float) -> int:
    """Return the power of two that puts the largest magnitude near 2^10: 34 binades above float16's smallest step."""
    return math.frexp(largest)[1] - 11 if largest > 0 else 0


def to_halves(values: np.ndarray, exponent: int = 0) -> np.ndarray:
    """Return ``values * 2^-exponent`` as little-endian float16, uint8 (2 * size,), clipped to the largest."""
    scaled = np.ldexp(values.astype(np.float64).reshape(-1), -exponent)
    return scaled.clip(-_LARGEST, _LARGEST).astype("<f2").view(np.uint8)


def halves(section: torch.Tensor) -> torch.Tensor:
    """Return the bytes of a section as float16 numbers, a view where they begin at an even address."""
    if section.storage_offset() % 2 or section.data_ptr() % 2:
        section = section.clone()
    return section.view(torch.float16)


def from_halves(section: torch.Tensor, exponent: int = 0) -> torch.Tensor:
    """Undo `to_halves`: float32 (size,), exact, on the device of the bytes."""
    # A float16 view must begin at an even address, which a section need not.
    return torch.ldexp(section.clone().view(torch.float16).to(torch.float32), torch.tensor(exponent))
