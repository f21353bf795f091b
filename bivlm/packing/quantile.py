"""The codec of quantile-grouped weights: a sign and a group for every weight, a level for the salient ones.

Sections of the packed weight:

0. parameters: groups K, salient bits N_b, mode, Rice parameter (uint8 each), exponent (int16), salient weights S
   (uint32); then float16 group scales (K,) and, if S > 0, float16 centres (2^N_b,).
1. float16 row scales (M,), if S > 0.
2. symbols, one for every weight (`radix`). Unsalient: ``2 * group + (w < 0)``.
3. - 5. in sparse mode, of the salient weights: unary gaps, gap remainders (`sparse`), and what of the level the symbol
   at their place cannot hold. A salient weight's symbol is its level modulo 2 K, so from K = 2 on a two-bit level
   costs nothing beside its position. In alphabet mode a salient weight has a symbol of its own, ``2 K + level``, which
   is smaller when many weights are salient. `pack` takes the smaller of the two.

Scales are float16 times 2^exponent, so that weights of any size keep 11 significant bits. A product of a scale and a
centre has at most 22 and is exact in float32: a rebuilt weight is rounded once, to the weight's dtype, with the same
result on every device.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from bivlm.kernels import gpu
from bivlm.numerics.half_scales import EXPONENTS, exponent_of, from_halves, halves, to_halves
from bivlm.packing import Activations, Codec, FormatBits, GpuProduct, Integers, Tunable, container
from bivlm.packing.container import ArrayT, Bytes, Header, as_array, section
from bivlm.packing.contents import Contents
from bivlm.packing.lookup import lookup
from bivlm.packing.plane_product import MOST_COLUMNS, Levels, Salient, can_multiply, product, reads
from bivlm.packing.radix import (
    CHUNK_SYMBOLS,
    check_symbols,
    count_symbols,
    pack_symbols,
    planes_of,
    radix,
    symbols_at,
    unpack_values,
)
from bivlm.packing.sparse import (
    check_positions,
    check_salient,
    pack_positions,
    pack_small,
    rice_cost,
    unpack_positions,
    unpack_small,
)

NAME = "quantile"
LARGEST_GROUPS, LARGEST_SALIENT_BITS = 16, 4
_PARAMETERS = struct.Struct("<BBBBhI")
_SECTIONS = 6
_SPARSE, _ALPHABET = 0, 1


@dataclass(frozen=True)
class _Parameters:
    groups: int
    salient_bits: int
    mode: int
    rice: int
    salient: int
    group_scales_K: np.ndarray  # float32, exact
    centres_L: np.ndarray  # float32, exact
    exponent: int

    @property
    def alphabet(self) -> int:
        return 2 * self.groups + (1 << self.salient_bits if self.mode == _ALPHABET else 0)


def packed_nbytes(shape: tuple[int, int], groups: int, salient_bits: int, positions_S: np.ndarray) -> int:
    """Return the bytes that `pack` would store for a layer with salient weights at `positions_S`."""
    salient = len(positions_S)
    numbers = groups + ((1 << salient_bits) + shape[0] if salient else 0)
    head = container.envelope_nbytes(_SECTIONS) + _PARAMETERS.size + 2 * numbers
    return head + _body_nbytes(shape, groups, salient_bits, positions_S)[1]


def pack(
    shape: tuple[int, int],
    dtype: torch.dtype,
    symbols: Callable[[int, int], torch.Tensor],
    *,
    group_scales_K: np.ndarray,
    salient_bits: int,
    positions_S: np.ndarray,
    levels_S: np.ndarray,
    centres_L: np.ndarray,
    row_scales_M: np.ndarray,
) -> torch.Tensor:
    """Return the packed weight, uint8 (bytes,).

    ``symbols(begin, end)`` gives ``2 * group + (w < 0)`` of every weight in these rows, uint8; what it says of salient
    weights does not matter. See `by_magnitude`.
    """
    groups, salient = len(group_scales_K), len(positions_S)
    mode, _, rice = _body_nbytes(shape, groups, salient_bits, positions_S)
    exponent = exponent_of(max(float(np.max(group_scales_K)), float(np.max(np.abs(row_scales_M), initial=0.0))))
    numbers = [to_halves(group_scales_K, exponent)] + ([to_halves(centres_L)] if salient else [])
    parameters = _PARAMETERS.pack(groups, salient_bits, mode, rice, exponent, salient)
    if mode == _SPARSE:
        marked, extra_bits = levels_S % (2 * groups), _extra_bits(groups, salient_bits)
        sparse = [*pack_positions(positions_S, rice), pack_small(levels_S // (2 * groups), extra_bits)]
    else:
        marked, sparse = levels_S + 2 * groups, [np.empty(0, np.uint8)] * 3
    alphabet = 2 * groups + (1 << salient_bits if mode == _ALPHABET else 0)
    sections = [
        np.concatenate([np.frombuffer(parameters, np.uint8), *numbers]),
        to_halves(row_scales_M, exponent) if salient else np.empty(0, np.uint8),
        _pack_all_symbols(shape, symbols, alphabet, positions_S, marked.astype(np.uint8)),
        *sparse,
    ]
    return container.write(NAME, shape, dtype, sections)


class QuantileCodec(Codec):
    """Reads what `pack` wrote."""

    name = NAME

    def check(self, contents: Contents) -> float:
        m, n = contents.header.shape
        groups, salient_bits, mode, rice, exponent, salient = contents.parameters(_PARAMETERS, more=True)
        contents.inside("groups", groups, range(1, LARGEST_GROUPS + 1))
        contents.inside("salient bits", salient_bits, range(1, LARGEST_SALIENT_BITS + 1))
        contents.inside("mode", mode, range(2))
        check_salient(contents, salient, rice)
        contents.inside("exponent", exponent, EXPONENTS)
        sparse, extra_bits = mode == _SPARSE, _extra_bits(groups, salient_bits)
        alphabet = 2 * groups + (0 if sparse else 1 << salient_bits)
        contents.lengths(
            {
                "parameters": _PARAMETERS.size + 2 * (groups + (1 << salient_bits if salient else 0)),
                "row scales": 2 * m if salient else 0,
                "symbols": radix(alphabet).nbytes(m, n),
                "positions": None if sparse else 0,
                "position remainders": -(-salient * rice // 8) if sparse else 0,
                "levels": -(-salient * extra_bits // 8) if sparse else 0,
            }
        )
        planes = _planes(contents.packed, contents.header, alphabet)
        found = check_symbols(contents, planes, alphabet, n, "symbols", None if sparse else 2 * groups)
        if sparse:
            contents.padding(5, salient * extra_bits, "levels")
            positions = check_positions(contents, 3, salient, rice)
            if salient and 2 * groups << extra_bits > 1 << salient_bits:
                highest = int(_sparse_levels(contents.packed, contents.header, groups, salient_bits, positions).max())
                fault = f"level {highest} of a salient weight, expected one below {1 << salient_bits}"
                contents.require(highest < 1 << salient_bits, fault)
        else:
            contents.inside("Rice parameter", rice, range(1))
            contents.require(found == salient, f"{found} symbols of salient weights, expected {salient}")
        scales, centres = np.split(contents.section(0)[_PARAMETERS.size :], [2 * groups])
        group = contents.largest_half(scales, "group scales", exponent)
        centre = contents.largest_half(centres, "centres")
        return max(group, contents.largest_half(contents.section(1), "row scales", exponent) * centre)

    def unpack(self, packed: torch.Tensor, header: Header) -> torch.Tensor:
        parameters = _read_parameters(packed, header)
        values = torch.from_numpy(parameters.group_scales_K).repeat_interleave(2)
        values[1::2] *= -1
        table = torch.zeros(parameters.alphabet)
        table[: len(values)] = torch.ldexp(values, torch.tensor(parameters.exponent))
        table = table.to(device=packed.device, dtype=header.dtype)
        planes = _planes(packed, header, parameters.alphabet)
        weight_MN = unpack_values(planes, table, header.shape[1])
        if parameters.salient:
            positions, levels = _salient(packed, header, parameters)
            row_scales = from_halves(section(packed, header, 1), parameters.exponent)
            centres = torch.from_numpy(parameters.centres_L).to(packed.device)
            rebuilt = row_scales[positions // header.shape[1]] * centres[levels]
            weight_MN.view(-1)[positions] = rebuilt.to(header.dtype)
        return weight_MN

    def integers(self, packed: torch.Tensor, header: Header) -> Integers | None:
        """Return groups at 1, 3, 5, ... times the smallest level, without salient weights, as 2 K codes; else None."""
        stored = _read_parameters(packed, header)
        odd_K = np.arange(1, 2 * stored.groups, 2, dtype=np.float32)
        if stored.salient or not np.array_equal(stored.group_scales_K, odd_K * stored.group_scales_K[0]):
            return None
        rows, columns = header.shape
        planes, symbols = _planes(packed, header, stored.alphabet), np.arange(stored.alphabet)
        # From the most negative level to the largest: symbol 2 k is level K + k, symbol 2 k + 1 level K - 1 - k.
        ascending = np.where(symbols % 2, stored.groups - 1 - symbols // 2, stored.groups + symbols // 2)
        table = torch.from_numpy(ascending.astype(np.uint8)).to(packed.device)

        def codes(rows_m: torch.Tensor) -> torch.Tensor:
            return unpack_values([plane[rows_m] for plane in planes], table, columns)

        least = torch.ldexp(torch.tensor(stored.group_scales_K[0]), torch.tensor(stored.exponent))
        zeros_MG = torch.full((rows, 1), 2 * stored.groups - 1, dtype=torch.uint8)
        return Integers(codes, 2 * stored.groups - 1, 2, least.expand(rows, 1), zeros_MG, columns)

    def multiplies(self, packed: torch.Tensor, header: Header) -> bool:
        stored = _read_parameters(packed, header)
        if stored.mode == _SPARSE and stored.salient and header.shape[1] > MOST_COLUMNS:
            return False
        if gpu.on_gpu(packed.device):
            return reads(stored.alphabet)
        return packed.device.type == "cpu" and can_multiply(stored.alphabet)

    def side_table(self, packed: torch.Tensor, header: Header) -> torch.Tensor:
        """Return of sparse salient weights where each row's and level's begin, uint32, and their columns, uint16."""
        stored = _read_parameters(packed, header)
        if stored.mode != _SPARSE or not stored.salient:
            return super().side_table(packed, header)
        rows, columns = header.shape
        positions_S, levels_S = (each.cpu().numpy() for each in _sparse_salient(packed, header, stored))
        row_S, column_S = positions_S // columns, positions_S % columns
        lists_S = row_S * len(stored.centres_L) + levels_S
        order_S = np.argsort(lists_S, kind="stable")
        begins = np.zeros(rows * len(stored.centres_L) + 1, "<u4")
        np.cumsum(np.bincount(lists_S, minlength=len(begins) - 1), out=begins[1:])
        sections = (begins, column_S[order_S].astype("<u2"))
        return torch.from_numpy(np.concatenate([each.view(np.uint8) for each in sections])).to(packed.device)

    def product(
        self,
        packed: torch.Tensor,
        header: Header,
        side_table: torch.Tensor,
        x_TN: torch.Tensor,
        activations: Activations = "float32",
    ) -> torch.Tensor:
        stored = _read_parameters(packed, header)
        table = _table(stored)
        levels, salient = Levels(table), None
        row_scales = as_array(section(packed, header, 1))
        if stored.salient and stored.mode == _ALPHABET:
            levels = Levels(table, _by_row(stored), row_scales)
        elif stored.salient:
            levels = Levels(table, None, row_scales)
            marks = _marks(stored)
            begins, columns = np.split(as_array(side_table), [4 * (header.shape[0] * len(marks) + 1)])
            salient = Salient(stored.centres_L, marks, begins.view("<u4"), columns.view("<u2"))
        symbols = as_array(section(packed, header, 2))
        in_bytes = activations == "int8"
        y_TM = product(symbols, stored.alphabet, header.shape, x_TN.numpy(), levels, salient, in_bytes=in_bytes)
        return torch.from_numpy(y_TM).mul_(2.0**stored.exponent)

    def gpu_product(self, packed: torch.Tensor, header: Header, side_table: torch.Tensor) -> GpuProduct:
        from bivlm.kernels import triton_planes

        stored = _read_parameters(packed, header)
        code = radix(stored.alphabet)
        by_row, salient, marks = stored.salient and stored.mode == _ALPHABET, None, _marks(stored)
        table = _table(stored)
        if stored.salient and not by_row:
            begins, columns = side_table.split([at := 4 * (header.shape[0] * len(marks) + 1), len(side_table) - at])
            centres = torch.from_numpy(np.stack([stored.centres_L, table[marks]])).to(packed.device)
            salient = triton_planes.Salient(centres, begins.view(torch.int32), columns.view(torch.uint16))
        tables = np.stack([table, _by_row(stored) if by_row else np.zeros_like(table)])
        return triton_planes.PlaneWeight(
            section(packed, header, 2),
            header.shape,
            stored.alphabet,
            code.per_word,
            code.planes,
            2.0**stored.exponent,
            torch.from_numpy(tables).to(packed.device),
            bool(by_row),
            halves(section(packed, header, 1)) if stored.salient else None,
            salient=salient,
        ).product

    def tunable(self, packed: torch.Tensor, header: Header) -> Tunable:
        """Return parameters ``group_scales`` (K,) and, if S > 0, ``row_scales`` (M,) and ``centres`` (2^N_b,)."""
        stored = _read_parameters(packed, header)
        group_scales = torch.from_numpy(stored.group_scales_K)
        parameters = {"group_scales": torch.ldexp(group_scales, torch.tensor(stored.exponent))}
        table = torch.arange(stored.alphabet, dtype=torch.uint8, device=packed.device)
        symbols = unpack_values(_planes(packed, header, stored.alphabet), table, header.shape[1]).view(-1)
        if stored.salient:
            parameters |= {
                "row_scales": from_halves(section(packed, header, 1), stored.exponent),
                "centres": torch.from_numpy(stored.centres_L),
            }
            positions, levels = _salient(packed, header, stored)
            symbols[positions] = 0  # any that the table has: what is looked up there is replaced
        parameters = {name: values.to(packed.device) for name, values in parameters.items()}

        def rebuild(values: dict[str, torch.Tensor]) -> torch.Tensor:
            scales = values["group_scales"]
            weight = lookup(torch.stack([scales, -scales], dim=-1).view(-1), symbols)
            if stored.salient:
                salient = values["row_scales"][positions // header.shape[1]] * values["centres"][levels]
                weight = weight.index_put((positions,), salient)
            return weight.view(header.shape)

        return Tunable(parameters, rebuild)

    def retuned(self, packed: torch.Tensor, header: Header, parameters: dict[str, torch.Tensor]) -> torch.Tensor:
        stored = _read_parameters(packed, header)
        numbers = {name: values.detach().cpu().numpy() for name, values in parameters.items()}
        head = section(packed, header, 0).cpu().numpy()[: _PARAMETERS.size]
        first = [head, to_halves(numbers["group_scales"], stored.exponent)]
        if not stored.salient:
            return container.rewrite(packed, header, {0: np.concatenate(first)})
        first.append(to_halves(numbers["centres"]))
        rows = to_halves(numbers["row_scales"], stored.exponent)
        return container.rewrite(packed, header, {0: np.concatenate(first), 1: rows})

    def bits(self, packed: Bytes, header: Header) -> FormatBits:
        packed = as_array(packed)
        parameters = _read_parameters(packed, header)
        m, n = header.shape
        size, salient = m * n, parameters.salient
        symbols = 2 * parameters.groups
        counts = count_symbols(_planes(packed, header, parameters.alphabet), parameters.alphabet, n)[:symbols]
        if salient and parameters.mode == _SPARSE:
            _, levels = _sparse_salient(packed, header, parameters)
            counts = counts - np.bincount(levels % symbols, minlength=symbols)
        group_counts = counts.reshape(-1, 2).sum(-1).tolist()
        shares = [count / size for count in [*group_counts, salient] if count]
        index = -sum(share * math.log2(share) for share in shares) * size
        scales = 16 * parameters.groups + 16 * m  # (26)
        return FormatBits(
            nominal=size + (parameters.salient_bits - 1) * salient + scales,
            entropy=index
            + (size - salient)
            + parameters.salient_bits * salient
            + (scales if salient else scales - 16 * m),
            stored=8 * len(packed),
        )


def _body_nbytes(
    shape: tuple[int, int], groups: int, salient_bits: int, positions_S: np.ndarray
) -> tuple[int, int, int]:
    """Return the smaller mode, the bytes of its symbols and sparse streams, and the Rice parameter."""
    rice, streams = rice_cost(positions_S)
    extra = -(-len(positions_S) * _extra_bits(groups, salient_bits) // 8)
    sparse = radix(2 * groups).nbytes(*shape) + streams + extra
    alphabet = radix(2 * groups + (1 << salient_bits)).nbytes(*shape)
    return (_SPARSE, sparse, rice) if sparse <= alphabet else (_ALPHABET, alphabet, 0)


def _extra_bits(groups: int, salient_bits: int) -> int:
    """Return the bits of a level that its symbol cannot hold."""
    return (-(-(1 << salient_bits) // (2 * groups)) - 1).bit_length()


def by_magnitude(weight_MN: torch.Tensor, boundaries_K: list[int]) -> Callable[[int, int], torch.Tensor]:
    """Return symbols for `pack`: group k holds the magnitudes' bit patterns above boundary k-1 and up to boundary k.

    What lies above the last boundary is in the top group.
    """
    from bivlm.numerics.weight_statistics import magnitude_patterns  # needs torch

    def symbols(begin: int, end: int) -> torch.Tensor:
        rows = weight_MN[begin:end].contiguous()
        integers = rows.view(torch.int16 if rows.element_size() == 2 else torch.int32)
        patterns = magnitude_patterns(rows)
        found = (integers < 0).to(torch.uint8)
        for boundary in boundaries_K[:-1]:
            found += (patterns > boundary).to(torch.uint8) << 1
        return found

    return symbols


def ready(symbols_MN: torch.Tensor) -> Callable[[int, int], torch.Tensor]:
    """Return symbols for `pack` that are there already, uint8 (M, N)."""
    return lambda begin, end: symbols_MN[begin:end].clone()


def _pack_all_symbols(
    shape: tuple[int, int],
    symbols: Callable[[int, int], torch.Tensor],
    alphabet: int,
    positions_S: np.ndarray,
    marked_S: np.ndarray,
) -> np.ndarray:
    """Return all planes, one after another, made a few rows at a time so that temporaries stay small."""
    rows, columns = shape
    code = radix(alphabet)
    planes = [np.empty((rows, nbytes), np.uint8) for nbytes in code.plane_row_bytes(columns)]
    step = max(1, CHUNK_SYMBOLS // columns)
    for begin in range(0, rows, step):
        end = min(begin + step, rows)
        chunk = symbols(begin, end)
        first, last = np.searchsorted(positions_S, [begin * columns, end * columns])
        inside = torch.from_numpy(positions_S[first:last] - begin * columns).to(chunk.device)
        chunk.view(-1)[inside] = torch.from_numpy(marked_S[first:last]).to(chunk.device)
        for plane, part in zip(planes, pack_symbols(chunk, alphabet), strict=True):
            plane[begin:end] = part
    return np.concatenate([plane.reshape(-1) for plane in planes])


def _read_parameters(packed: ArrayT, header: Header) -> _Parameters:
    head = as_array(section(packed, header, 0))
    groups, salient_bits, mode, rice, exponent, salient = _PARAMETERS.unpack_from(head.tobytes())
    numbers = head[_PARAMETERS.size :].view("<f2").astype(np.float32)
    return _Parameters(groups, salient_bits, mode, rice, salient, numbers[:groups], numbers[groups:], exponent)


def _table(stored: _Parameters) -> np.ndarray:
    """Return what symbols stand for, float32 (alphabet,), zero for those of salient weights."""
    table = np.zeros(stored.alphabet, np.float32)
    table[: 2 * stored.groups : 2] = stored.group_scales_K
    table[1 : 2 * stored.groups : 2] = -stored.group_scales_K
    return table


def _by_row(stored: _Parameters) -> np.ndarray:
    """Return what symbols stand for beside that in alphabet mode, float32 (alphabet,), in scales of their row."""
    return np.concatenate([np.zeros(2 * stored.groups, np.float32), stored.centres_L])


def _marks(stored: _Parameters) -> np.ndarray:
    """Return the symbol at the place of a salient weight with each level in sparse mode, uint8 (L,)."""
    return (np.arange(len(stored.centres_L)) % (2 * stored.groups)).astype(np.uint8)


def _planes(packed: ArrayT, header: Header, alphabet: int) -> list[ArrayT]:
    return planes_of(section(packed, header, 2), alphabet, *header.shape)


def _salient(packed: torch.Tensor, header: Header, parameters: _Parameters) -> tuple[torch.Tensor, torch.Tensor]:
    """Return flat positions and levels of the salient weights, int64 (S,) each."""
    if parameters.mode == _SPARSE:
        return _sparse_salient(packed, header, parameters)
    table = torch.arange(parameters.alphabet, dtype=torch.int16, device=packed.device)
    symbols = unpack_values(_planes(packed, header, parameters.alphabet), table, header.shape[1]).view(-1)
    positions = torch.nonzero(symbols >= 2 * parameters.groups).view(-1)
    return positions, symbols[positions].to(torch.int64) - 2 * parameters.groups


def _sparse_salient(packed: ArrayT, header: Header, parameters: _Parameters) -> tuple[ArrayT, ArrayT]:
    """Return what `_salient` does, of a weight in sparse mode."""
    unary, remainders = section(packed, header, 3), section(packed, header, 4)
    positions = unpack_positions(unary, remainders, parameters.salient, parameters.rice)
    return positions, _sparse_levels(packed, header, parameters.groups, parameters.salient_bits, positions)


def _sparse_levels(packed: ArrayT, header: Header, groups: int, salient_bits: int, positions: ArrayT) -> ArrayT:
    """Return levels, int64 (S,), of the salient weights at these positions in sparse mode."""
    low = symbols_at(_planes(packed, header, 2 * groups), 2 * groups, header.shape[1], positions)
    high = unpack_small(section(packed, header, 5), len(positions), _extra_bits(groups, salient_bits))
    return low + 2 * groups * high
