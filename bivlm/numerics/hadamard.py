"""Random rotations: signs and a Hadamard transform, which make the entries of a weight or of its inputs alike.

An orthogonal R of any width: random signs, then the normalised Hadamard transform on the first p channels, then signs
and the transform on the last p, p the largest power of two that is not above the width (QuIP#, arXiv 2402.04396, has
the power of two; the overlap serves the others: with outlying channels of widths such as 3420 one block of a dividing
power of two would leave them within it). Without signs between, the second transform would undo much of the first:
applied twice it is the identity. A weight W (M, N) is stored as ``R_M W R_N^T``; with x rotated by R_N it gives the
output rotated by R_M. Adding up runs in a fixed order of float32 additions, the same on every device.
"""

from __future__ import annotations

import ctypes
from functools import cache

import numpy as np
import torch

from bivlm import kernels

_TOGETHER = 1 << 22


def rotate(x: torch.Tensor, seed: int) -> torch.Tensor:
    """Return ``R x`` along the last dimension, a new float32 tensor (..., N); R is of width N and this seed."""
    width = x.shape[-1]
    first, second = (signs.to(x.device) for signs in _signs(width, seed))
    out = (x.to(torch.float32) * first).reshape(-1, width).contiguous()
    part = _largest_power(width)
    _transform(out[:, :part])
    if part < width:
        _transform(out[:, width - part :].mul_(second))
    return out.view(x.shape)


def rotate_back(x: torch.Tensor, seed: int) -> torch.Tensor:
    """Return ``R^T x``, the inverse of `rotate`, a new float32 tensor (..., N)."""
    width = x.shape[-1]
    first, second = (signs.to(x.device) for signs in _signs(width, seed))
    out = x.to(torch.float32, copy=True).reshape(-1, width).contiguous()
    part = _largest_power(width)
    if part < width:
        _transform(out[:, width - part :])
        out[:, width - part :].mul_(second)
    _transform(out[:, :part])
    return out.mul_(first).view(x.shape)


def rotate_moment(moment_NN: torch.Tensor, seed: int) -> torch.Tensor:
    """Return ``R H R^T`` of a second moment (N, N), symmetric."""
    half = rotate(moment_NN, seed)
    return rotate(half.T.contiguous(), seed)


def _largest_power(width: int) -> int:
    return 1 << (width.bit_length() - 1)


@cache
def _signs(width: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return random signs, float32, of all channels and of the last p: bits of PCG64, whose stream numpy keeps."""
    both = width + _largest_power(width)
    words = np.random.PCG64([seed, width]).random_raw(-(-both // 64))
    bits = np.unpackbits(np.asarray(words, dtype="<u8").view(np.uint8), bitorder="little")[:both]
    first, second = torch.from_numpy(1 - 2 * bits.astype(np.float32)).split([width, both - width])
    return first, second


def _transform(x_RN: torch.Tensor) -> None:
    """Transform rows, their width a power of two, each in one piece, in place, and divide by its square root."""
    rows, width = x_RN.shape
    library = kernels.native()
    if library is not None and x_RN.device.type == "cpu":
        sizes = map(ctypes.c_int64, (rows, width, x_RN.stride(0)))
        library.bivlm_hadamard(ctypes.c_void_p(x_RN.data_ptr()), *sizes, ctypes.c_float(width**-0.5))
        return
    for some in x_RN.split(max(1, _TOGETHER // width)):
        half = 1
        while half < width:
            pairs = some.unflatten(1, (width // (2 * half), 2, half))
            first, second = pairs[:, :, 0], pairs[:, :, 1]
            difference = first - second
            first += second
            second.copy_(difference)
            half *= 2
        some.mul_(width**-0.5)
