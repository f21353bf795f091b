"""Positions of the few salient weights: gaps between ascending positions, Rice-coded in two streams.

A gap g becomes ``q = g >> k`` zeros and a one in the unary stream, and its k low bits in the remainder stream. Gaps
between independent positions are geometric, for which this is within 0.03-0.1 bits of the entropy; and both streams
unpack without a loop over the positions.
"""

from __future__ import annotations

import ctypes

import numpy as np
import torch

from bivlm import kernels
from bivlm.packing.container import ArrayT, as_array
from bivlm.packing.contents import Contents


def rice_cost(positions: np.ndarray) -> tuple[int, int]:
    """Return the best Rice parameter k for `positions` (S,), ascending, and the bytes of both streams together."""
    if len(positions) == 0:
        return 0, 0
    gaps = _gaps(positions)
    best = max(0, int(np.log2(max(1.0, float(gaps.mean()) * np.log(2)))))
    costs = []
    for k in range(max(0, best - 1), best + 3):
        unary_bits = int((gaps >> k).sum()) + len(gaps)
        costs.append((-(-unary_bits // 8) + -(-len(gaps) * k // 8), k))
    nbytes, k = min(costs)
    return k, nbytes


def pack_positions(positions: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return unary and remainder streams, uint8 arrays, of ascending `positions` (S,) at Rice parameter `k`."""
    gaps = _gaps(positions)
    ends = np.cumsum((gaps >> k) + 1) - 1
    unary = np.zeros(int(ends[-1]) + 1 if len(ends) else 0, np.uint8)
    unary[ends] = 1
    return np.packbits(unary, bitorder="little"), pack_small(gaps, k)


def unpack_positions(unary: ArrayT, remainders: ArrayT, count: int, k: int) -> ArrayT:
    """Undo `pack_positions`: int64 (count,), ascending; an array if the streams are, else on their device."""
    library = kernels.native()
    if library is not None and (isinstance(unary, np.ndarray) or unary.device.type == "cpu"):
        positions, streams = np.empty(count, np.int64), [as_array(stream) for stream in (unary, remainders)]
        at, whole = kernels.pointer, ctypes.c_int64
        described = [each for stream in streams for each in (at(stream), whole(len(stream)))]
        library.bivlm_positions(*described, whole(count), whole(k), at(positions))
        return positions if isinstance(unary, np.ndarray) else torch.from_numpy(positions)
    if isinstance(unary, np.ndarray):
        ends = np.flatnonzero(np.unpackbits(unary, bitorder="little"))[:count]
        return np.cumsum((_gaps(ends) << k) + unpack_small(remainders, count, k) + 1) - 1
    ends = torch.nonzero(_bits(unary)).view(-1)[:count]
    quotients = torch.diff(ends, prepend=ends.new_tensor([-1])) - 1
    gaps = (quotients << k) + unpack_small(remainders, count, k)
    return torch.cumsum(gaps.add_(1), 0).sub_(1)


def check_salient(contents: Contents, count: int, k: int) -> None:
    """Raise `InputError` unless the weight can have `count` salient entries and Rice parameter `k`."""
    contents.inside("salient weights", count, range(contents.size + 1))
    contents.inside("Rice parameter", k, range(contents.size.bit_length() + 1))


def check_positions(contents: Contents, index: int, count: int, k: int) -> np.ndarray:
    """Return the positions, int64 (S,), that sections `index` and `index + 1` hold.

    `count` and `k` passed `check_salient`, and section `index + 1` has the length that they need. Raises `InputError`
    unless the unary stream is `count` gaps and nothing else, and all positions are below M * N. For fewer than eight
    gaps two parameters can need as many bytes: `k` must then be the one that packing chooses.
    """
    unary = contents.section(index)
    ones = int(np.bitwise_count(unary).sum(dtype=np.int64))
    contents.require(ones == count, f"{ones} gaps between positions, expected {count}")
    contents.require(count == 0 or unary[-1] > 0, "gaps between positions: bytes behind the last one")
    contents.require(count > 0 or len(unary) == 0, f"{len(unary)} bytes of positions, expected 0")
    contents.padding(index + 1, count * k, "position remainders")
    # So that no stream of zeros, however long, is spread out.
    fault = f"positions beyond the last weight, expected all below {contents.size}"
    contents.require((8 * len(unary) - 7 - count) << k < contents.size, fault)
    positions = unpack_positions(unary, contents.section(index + 1), count, k)
    contents.require(count == 0 or int(positions[-1]) < contents.size, fault)
    if count < 8:
        best, _ = rice_cost(positions)
        contents.require(k == best, f"damaged parameters: Rice parameter {k}, expected {best} for these positions")
    return positions


def pack_small(values: np.ndarray, bits: int) -> np.ndarray:
    """Pack the `bits` low bits of `values` (S,) one after another, lowest bit first."""
    spread = np.empty((len(values), bits), np.uint8)
    for bit in range(bits):
        spread[:, bit] = (values >> bit) & 1
    return np.packbits(spread.reshape(-1), bitorder="little")


def unpack_small(packed: ArrayT, count: int, bits: int) -> ArrayT:
    """Undo `pack_small`: int64 (count,), an array if `packed` is one."""
    if isinstance(packed, np.ndarray):
        spread = np.unpackbits(packed, count=count * bits, bitorder="little").reshape(count, bits)
        return spread @ (1 << np.arange(bits))
    values = torch.zeros(count, dtype=torch.int64, device=packed.device)
    spread = _bits(packed)[: count * bits].view(count, bits)
    for bit in range(bits):
        values += spread[:, bit].to(torch.int64) << bit
    return values


def _gaps(positions: np.ndarray) -> np.ndarray:
    return np.diff(positions, prepend=-1) - 1


def _bits(packed: torch.Tensor) -> torch.Tensor:
    """Return uint8 bits (8 * bytes,), lowest first."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return ((packed.unsqueeze(-1) >> shifts) & 1).view(-1)
