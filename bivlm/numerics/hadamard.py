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
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch

from bivlm import kernels

_TOGETHER = 1 << 22


@dataclass(frozen=True)
class Rotation:
    """R of a width.

    Attributes:
        first: random signs of all channels, float32 (N,).
        second: those of the last p, before the second transform.
    """

    first: torch.Tensor
    second: torch.Tensor

    def apply(self, x_RN: torch.Tensor, *, back: bool = False) -> torch.Tensor:
        """Turn rows, float32 and in one piece, in place by R or back by R^T, and return them."""
        rows, width = x_RN.shape
        library = kernels.native()
        if library is not None and x_RN.device.type == "cpu":
            sizes = map(ctypes.c_int64, (rows, width))
            library.bivlm_rotate(kernels.pointer(x_RN.numpy()), *sizes, *self.native_form(), ctypes.c_int64(back))
            return x_RN
        first, second = self.first.to(x_RN.device), self.second.to(x_RN.device)
        part = len(second)
        last = x_RN[:, width - part :] if part < width else None
        if not back:
            _transform(x_RN.mul_(first)[:, :part])
            if last is not None:
                _transform(last.mul_(second))
            return x_RN
        if last is not None:
            _transform(last)
            last.mul_(second)
        _transform(x_RN[:, :part])
        return x_RN.mul_(first)

    def native_form(self) -> tuple[Any, ...]:
        """Return p, the factor of a transform, and the addresses of the signs, as native functions take them."""
        part = len(self.second)
        signs = (kernels.pointer(each.numpy()) for each in (self.first, self.second))
        return ctypes.c_int64(part), ctypes.c_float(part**-0.5), *signs


@dataclass(frozen=True)
class MatrixRotation:
    """R as products with small matrices: for a GPU, which a call for each of log N additions would keep waiting.

    Sums have another order than those of `Rotation`, and torch's precision of float32 products applies.

    Attributes:
        first: as in `Rotation`.
        second: as in `Rotation`.
        left: Hadamard's matrix, orthogonal, float32 (A, A).
        right: another one, (B, B), with ``A B = p``.
    """

    first: torch.Tensor
    second: torch.Tensor
    left: torch.Tensor
    right: torch.Tensor

    def apply(self, x_RN: torch.Tensor, *, back: bool = False) -> torch.Tensor:
        """Return rows, float32, turned by R or back by R^T, a new tensor."""
        over = len(self.first) - len(self.second)
        if not back:
            x_RN = x_RN * self.first
            head = self._transformed(x_RN[:, : len(self.second)])
            if not over:
                return head
            last = torch.cat([head[:, over:], x_RN[:, len(self.second) :]], 1) * self.second
            return torch.cat([head[:, :over], self._transformed(last)], 1)
        if over:
            last = self._transformed(x_RN[:, over:]) * self.second
            x_RN = torch.cat([x_RN[:, :over], last], 1)
        head = self._transformed(x_RN[:, : len(self.second)])
        return torch.cat([head, x_RN[:, len(self.second) :]], 1) * self.first

    def _transformed(self, x_RP: torch.Tensor) -> torch.Tensor:
        parts = x_RP.reshape(-1, len(self.left), len(self.right))
        return (self.left @ (parts @ self.right)).reshape(x_RP.shape)


@cache
def matrix_rotation(width: int, seed: int, device: torch.device) -> MatrixRotation:
    """Return `rotation` of this width and seed as matrix products on a device."""
    found = rotation(width, seed)
    bits = len(found.second).bit_length() - 1
    matrices = [_hadamard(bits // 2), _hadamard(bits - bits // 2)]
    return MatrixRotation(*(each.to(device) for each in (found.first, found.second, *matrices)))


def _hadamard(bits: int) -> torch.Tensor:
    matrix = torch.ones(1, 1)
    for _ in range(bits):
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix * len(matrix) ** -0.5


def rotate(x: torch.Tensor, seed: int) -> torch.Tensor:
    """Return ``R x`` along the last dimension, a new float32 tensor (..., N); R is of width N and this seed."""
    return rotation(x.shape[-1], seed).apply(_copied(x)).view(x.shape)


def rotate_back(x: torch.Tensor, seed: int) -> torch.Tensor:
    """Return ``R^T x``, the inverse of `rotate`, a new float32 tensor (..., N)."""
    return rotation(x.shape[-1], seed).apply(_copied(x), back=True).view(x.shape)


def rotate_moment(moment_NN: torch.Tensor, seed: int) -> torch.Tensor:
    """Return ``R H R^T`` of a second moment (N, N), symmetric."""
    half = rotate(moment_NN, seed)
    return rotate(half.T.contiguous(), seed)


@cache
def rotation(width: int, seed: int) -> Rotation:
    """Return R of this width and seed: its signs are bits of PCG64, whose stream numpy keeps."""
    both = width + (1 << (width.bit_length() - 1))
    words = np.random.PCG64([seed, width]).random_raw(-(-both // 64))
    bits = np.unpackbits(np.asarray(words, dtype="<u8").view(np.uint8), bitorder="little")[:both]
    first, second = torch.from_numpy(1 - 2 * bits.astype(np.float32)).split([width, both - width])
    return Rotation(first, second)


def _copied(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.float32, memory_format=torch.contiguous_format, copy=True).view(-1, x.shape[-1])


def _transform(x_RN: torch.Tensor) -> None:
    """Transform rows, their width a power of two, each in one piece, in place, and divide by its square root."""
    width = x_RN.shape[1]
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
