"""Trellis-coded quantization: a sequence of numbers as bits whose last L, the state, choose each number's level.

A step takes in k new bits, ``s_t = (s_(t-1) 2^k + b_t) mod 2^L`` (a bit-shift trellis: QTIP, arXiv 2406.11235), and
reads the level of the new state in a table. There are 16 levels, those of Bi-VLM: a sign and one of eight groups of
magnitudes, unequal ones, of which the last hold the salient tail. So sign, group and salient level of a weight cost the
k bits of its step together, whatever their entropy. A `rate` of bits per number is a pattern of k over four steps. A
step without bits reads a second table at the state as it is.

A sequence bites its tail: the state before its first step is the one after its last, so that no bits are spent on a
first state; one of fewer than 64 numbers begins at state 0 instead. The search (Viterbi's) finds the seam's state on a
free path around it, then the best path that begins and ends there. Path costs are integers, 16 bits: every machine
finds the same path.

Tables are trained on a unit Gaussian and are part of the format. Those of 2^12 states are by windows of four bits,
which a processor looks up in its registers (`benchmarks.trellis_windows`); those of more states are free
(`benchmarks.trellis_codes`).
"""

from __future__ import annotations

import ctypes
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from bivlm import kernels
from bivlm.errors import InputError

RATES = tuple(quarters / 4 for quarters in range(2, 13))
StateBits = Literal[12, 14, 16]
STATE_BITS: tuple[int, ...] = get_args(StateBits)
LEVELS = 16
MAGNITUDES = LEVELS // 2
WINDOW_STATE_BITS = 12
FREE_STATE_BITS = tuple(bits for bits in STATE_BITS if bits != WINDOW_STATE_BITS)
WINDOWS = (0, 4, 8)  # where windows of four bits lie in a state of 12
# How many of 32 places, from zero on, are a magnitude's: the shares of the states that free tables give them.
_MAGNITUDE_OF_PLACE = np.repeat(np.arange(MAGNITUDES, dtype=np.uint8), (7, 6, 6, 5, 4, 2, 1, 1))
INDEX_OF_PLACE = np.concatenate([_MAGNITUDE_OF_PLACE[::-1] + np.uint8(MAGNITUDES), _MAGNITUDE_OF_PLACE])
PLACES = len(INDEX_OF_PLACE)
WINDOW_CODES = Path(__file__).with_name("trellis_windows.json")
PERIOD = 4  # steps, after which a pattern of bits begins again
SHORTEST = 64  # of the sequences that bite their tail: they have more bits than a state, whatever their rate
# Of a path's cost in a variance, times the rate: 64 variances at one bit are between the best path and those that are
# given up. With 16 at half a bit, the best path from the state at the seam would be given up for others.
_UNIT = 1024.0
# Times the bits of a state, either side of the seam: the best path there depends on little more. With all of a tile of
# 256 the error is lower by 1.3 % at two bits, and the search takes 1.6 times as long.
_SEAM_BITS = 5
_TOGETHER = 1 << 24  # path costs of sequences that numpy searches at once
_TOGETHER_READ = 1 << 20  # numbers whose bits are read or written at once


@dataclass(frozen=True)
class TrellisCode:
    """A code for unit variance.

    Attributes:
        state_bits: L.
        rate: bits per number.
        table: uint8 (2, 2^L), the level of a state after a step with bits, and after one without.
        magnitudes: float32 (8,), rising, of a unit Gaussian.
        error: mean squared error on a unit Gaussian, in sequences of 256.
        windows: of tables by windows, uint8 (2, 3, 16): the level of a state of 12 bits is the one at a place among 64,
            from the lowest level on, and the place is the exclusive or of what these say of the state's three windows
            of four bits. Empty for free tables.
    """

    state_bits: int
    rate: float
    table: np.ndarray
    magnitudes: np.ndarray
    error: float
    windows: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint8))

    @property
    def pattern(self) -> tuple[int, ...]:
        """Bits of each of four steps."""
        return pattern(self.rate)


@cache
def pattern(rate: float) -> tuple[int, ...]:
    """Return the bits of each of four steps, the first step with some."""
    ends = [-(-step * round(rate * PERIOD) // PERIOD) for step in range(PERIOD + 1)]
    return tuple(end - begin for begin, end in pairwise(ends))


@cache
def steps_of(rate: float, length: int) -> np.ndarray:
    """Return the bits of every step of a sequence, uint8 (length,), not to be written to."""
    steps = np.resize(np.array(pattern(rate), np.uint8), length)
    steps.flags.writeable = False
    return steps


def bits_of(rate: float, lengths: np.ndarray) -> np.ndarray:
    """Return the bits of sequences, int64 (R,), by their lengths."""
    return -(-lengths * round(rate * PERIOD) // PERIOD)


@cache
def trellis_code(state_bits: int, rate: float) -> TrellisCode:
    """Return the code of this many states and this rate; raises `InputError` if there is none."""
    if rate not in RATES or state_bits not in STATE_BITS:
        raise InputError(f"trellis code of {state_bits} state bits, rate {rate}: expected {STATE_BITS} and {RATES}")
    if state_bits == WINDOW_STATE_BITS:
        return from_json(json.loads(WINDOW_CODES.read_text())[str(rate)], rate)
    file = resources.files("bivlm.numerics") / "trellis_codes" / f"{state_bits}-{rate}.bin"
    return from_bytes(file.read_bytes(), state_bits, rate)


def from_bytes(content: bytes, state_bits: int, rate: float) -> TrellisCode:
    """Return the code in `content`: the error, eight magnitudes (float32), the tables, two states a byte."""
    numbers = np.frombuffer(content, "<f4", 1 + MAGNITUDES)
    packed = np.frombuffer(content, np.uint8, offset=numbers.nbytes)
    table = np.stack([packed & 15, packed >> 4], axis=1).reshape(-1, 1 << state_bits)
    table = np.ascontiguousarray(np.broadcast_to(table, (2, 1 << state_bits)))
    return TrellisCode(state_bits, rate, table, numbers[1:].copy(), float(numbers[0]))


def to_bytes(code: TrellisCode) -> bytes:
    """Return what `from_bytes` reads; the second table only where some step reads it."""
    table = code.table[: 1 + (0 in code.pattern)].reshape(-1, 2)
    numbers = np.array([code.error, *code.magnitudes], "<f4")
    return numbers.tobytes() + (table[:, 0] | table[:, 1] << 4).astype(np.uint8).tobytes()


def of_windows(windows: np.ndarray, magnitudes: np.ndarray, rate: float, error: float) -> TrellisCode:
    """Return the code of 2^12 states with these tables by windows, uint8 (2, 3, 16), and magnitudes, float32 (8,)."""
    states = np.arange(1 << WINDOW_STATE_BITS)
    place = np.bitwise_xor.reduce([windows[:, k, states >> at & 15] for k, at in enumerate(WINDOWS)])
    return TrellisCode(WINDOW_STATE_BITS, rate, INDEX_OF_PLACE[place], magnitudes, error, windows)


def from_json(content: dict[str, Any], rate: float) -> TrellisCode:
    """Return the code of its error, magnitudes and tables by windows, two hexadecimal digits for each place."""
    kinds = np.array([[[*bytes.fromhex(table)] for table in kind] for kind in content["tables"]], np.uint8)
    windows = np.ascontiguousarray(np.broadcast_to(kinds, (2, *kinds.shape[1:])))
    magnitudes = np.array([float.fromhex(each) for each in content["magnitudes"]], np.float32)
    return of_windows(windows, magnitudes, rate, content["error"])


def to_json(code: TrellisCode) -> dict[str, Any]:
    """Return what `from_json` reads; the second tables only where some step reads them."""
    return {
        "error": round(code.error, 5),
        "magnitudes": [float(each).hex() for each in code.magnitudes],
        "tables": [[table.tobytes().hex() for table in kind] for kind in code.windows[: 1 + (0 in code.pattern)]],
    }


def levels_of(magnitudes: np.ndarray) -> np.ndarray:
    """Return the 16 levels, float32, of eight magnitudes: index 8 and more are negative."""
    return np.concatenate([magnitudes, -magnitudes]).astype(np.float32)


def search(
    x_RT: np.ndarray, code: TrellisCode, levels: np.ndarray, weights_RT: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the best paths for R sequences of unit variance: the new bits and the level of each step, uint8 (R, T).

    `x_RT` is float32 and finite; numbers further than one beyond all levels count as if they were there. `levels` (16,)
    are what the code's levels stand for now; `weights_RT` of squared errors, float32 with a mean of about 1.
    """
    reach, unit = float(np.float32(1 + float(np.abs(levels).max()))), _UNIT * code.rate
    steps = steps_of(code.rate, x_RT.shape[1])
    around = min(x_RT.shape[1] // 2, -(-round(_SEAM_BITS * code.state_bits / code.rate) // PERIOD) * PERIOD)
    if kernels.native() is not None:
        return _search_native(x_RT, code, levels, weights_RT, steps, reach, unit, around)
    warn_of_time()
    cost_RTS = _level_costs(x_RT, levels, reach, unit, weights_RT)
    together = max(1, _TOGETHER // (x_RT.shape[1] << (code.state_bits - 1)))
    parts = [cost_RTS[at : at + together] for at in range(0, len(x_RT), together)]
    symbols_RT = np.concatenate([_search(part, steps, code, around) for part in parts])
    return symbols_RT, level_indices(symbols_RT, code)


@cache
def warn_of_time() -> None:
    """Warn once that the search is slow, unless the user asked for it."""
    if not kernels.switched_off():
        warnings.warn(
            "without native code the trellis is searched 60 times as slowly; installing bivlm where there is a C "
            "compiler builds it",
            stacklevel=3,
        )


def _search_native(
    x_RT: np.ndarray,
    code: TrellisCode,
    levels: np.ndarray,
    weights_RT: np.ndarray | None,
    steps: np.ndarray,
    reach: float,
    unit: float,
    around: int,
) -> tuple[np.ndarray, np.ndarray]:
    library = kernels.native()
    assert library is not None
    x_RT = np.ascontiguousarray(x_RT)
    symbols_RT, indices_RT = np.empty(x_RT.shape, np.uint8), np.empty(x_RT.shape, np.uint8)
    at, whole = kernels.pointer, ctypes.c_int64
    failed = library.bivlm_trellis_search(
        at(x_RT),
        at(np.ascontiguousarray(weights_RT)) if weights_RT is not None else None,
        *map(whole, x_RT.shape),
        at(steps),
        whole(code.state_bits),
        at(code.table),
        at(levels),
        ctypes.c_float(reach),
        ctypes.c_float(unit),
        whole(around),
        at(symbols_RT),
        at(indices_RT),
    )
    if failed:
        raise MemoryError("no memory for a search of the trellis")
    return symbols_RT, indices_RT


def _level_costs(
    x_RT: np.ndarray, levels: np.ndarray, reach: float, unit: float, weights_RT: np.ndarray | None
) -> np.ndarray:
    """Return what each level costs at each step, uint16 (R, T, 16)."""
    apart = np.clip(x_RT, np.float32(-reach), np.float32(reach))[:, :, None] - levels
    cost = apart * apart * np.float32(unit)
    if weights_RT is not None:
        cost = cost * weights_RT[:, :, None]
    return np.minimum(cost + np.float32(0.5), np.float32(65535)).astype(np.uint16)


def _search(cost_RTS: np.ndarray, steps: np.ndarray, code: TrellisCode, around: int) -> np.ndarray:
    """Search as the native code does, all sequences together, step by step."""
    rows, length = cost_RTS.shape[:2]
    walk = _Walk(code, steps, cost_RTS)
    states = np.arange(1 << code.state_bits)
    if length < SHORTEST:
        every, shared_R, inside = 1, np.zeros(rows, np.int64), np.broadcast_to(states == 0, (rows, len(states)))
    else:
        cost_RS = np.zeros((rows, len(states)), np.uint16)
        seam = [at % length for at in range(length - around, length + around)]
        state_R = walk.back(seam[around:], walk.run(seam, cost_RS)[around:], cost_RS.argmin(1))[-1]
        every = len(states) >> int(steps[0])
        shared_R = state_R & (every - 1)
        inside = states % every == shared_R[:, None]
    cost_RS = np.where(inside, np.uint16(0), np.uint16(65535))
    chosen = walk.run(range(length), cost_RS)
    ends = cost_RS.reshape(rows, -1, every)[np.arange(rows), :, shared_R].argmin(1) * every + shared_R
    path = walk.back(range(length), chosen, ends)[-2::-1]
    return np.stack([(path[t] & ((1 << int(steps[t])) - 1)).astype(np.uint8) for t in range(length)], axis=1)


class _Walk:
    """Steps of the search through the states of some sequences."""

    def __init__(self, code: TrellisCode, steps: np.ndarray, cost_RTS: np.ndarray) -> None:
        self._code, self._steps, self._costs = code, steps, cost_RTS
        self._keep = np.uint16(65535 ^ ((1 << max(1, int(steps.max()))) - 1))

    def run(self, at: Sequence[int], cost_RS: np.ndarray) -> list[np.ndarray]:
        """Bring the cost of every state forward in place; return which predecessor each group of states came from."""
        came_from = []
        for t in at:
            bits = int(self._steps[t])
            if bits:
                kept = (cost_RS & self._keep).reshape(len(cost_RS), 1 << bits, -1)
                for number in range(1, 1 << bits):
                    kept[:, number] |= np.uint16(number)
                best = kept.min(1)
                came_from.append((best & ~self._keep).astype(np.uint8))
                best &= self._keep
                best -= best.min(1, keepdims=True)
            else:
                best = cost_RS
                came_from.append(np.empty((len(cost_RS), 0), np.uint8))
            added = self._costs[:, t][:, self._code.table[0 if bits else 1]]
            total = np.repeat(best, 1 << bits, axis=1) + added
            cost_RS[:] = np.where(total < added, np.uint16(65535), total)
        return came_from

    def back(self, at: Sequence[int], came_from: list[np.ndarray], state_R: np.ndarray) -> list[np.ndarray]:
        """Return the states from the last one back to that before the first step."""
        states = [state_R]
        for t, chosen in zip(reversed(at), reversed(came_from), strict=True):
            bits = int(self._steps[t])
            if bits:
                state = states[-1]
                group = state >> bits
                first = chosen[np.arange(len(state)), group].astype(np.int64)
                states.append(first << (self._code.state_bits - bits) | group)
            else:
                states.append(states[-1])
        return states


def write(symbols: np.ndarray, lengths: np.ndarray, rate: float) -> np.ndarray:
    """Return the bytes, uint8, of sequences of these lengths, int64 (R,), whose new bits come one after another."""
    bits = np.empty(int(bits_of(rate, lengths).sum()), np.uint8)
    taken = first = 0
    for some in np.array_split(lengths, -(-len(symbols) // _TOGETHER_READ)):
        numbers = int(some.sum())
        place = np.arange(numbers) - np.repeat(np.cumsum(some) - some, some)
        steps = np.array(pattern(rate), np.uint8)[place % PERIOD]
        ends = taken + np.cumsum(steps, dtype=np.int64)
        for number in range(int(steps.max())):
            there = steps > number
            bits[ends[there] - 1 - number] = symbols[first : first + numbers][there] >> number & 1
        taken, first = int(ends[-1]), first + numbers
    return np.packbits(bits)


def read(stream: np.ndarray, lengths: np.ndarray, code: TrellisCode) -> np.ndarray:
    """Return the level of every number, uint8, of sequences of these lengths, int64 (R,), one after another."""
    library = kernels.native()
    begins = np.concatenate([[0], np.cumsum(bits_of(code.rate, lengths))]).astype(np.int64)
    found = np.empty(int(lengths.sum()), np.uint8)
    if library is not None:
        stream = np.concatenate([stream, np.zeros(8, np.uint8)])  # words are read whole
        at, whole = kernels.pointer, ctypes.c_int64
        pattern_bits = np.array(code.pattern, np.uint8)
        library.bivlm_trellis_read(
            at(stream),
            at(begins),
            at(np.ascontiguousarray(lengths)),
            whole(len(lengths)),
            at(pattern_bits),
            whole(code.state_bits),
            at(code.table),
            at(found),
        )
        return found
    pairs = stream.astype(np.uint16) << 8
    pairs[:-1] |= stream[1:]
    firsts = np.cumsum(lengths) - lengths
    for length in np.unique(lengths).tolist():
        rows = np.flatnonzero(lengths == length)
        for some in np.array_split(rows, -(-len(rows) * length // _TOGETHER_READ)):
            first, levels_RT = firsts[some[0]], _read(pairs, begins[some], length, code)
            if some[-1] - some[0] == len(some) - 1:
                found[first : first + levels_RT.size] = levels_RT.reshape(-1)
            else:
                found[firsts[some, None] + np.arange(length)] = levels_RT
    return found


def _read(pairs: np.ndarray, begins: np.ndarray, length: int, code: TrellisCode) -> np.ndarray:
    """Return the levels (R, T) of sequences of one length, which begin at these bits; `pairs` has 16 bits at each byte.

    A state is a window on the bits of its sequence, before the first of which the last ones stand. After 32 steps
    windows lie in their bytes as before.
    """
    count = int(steps_of(code.rate, length).sum())
    nbytes = -(-count // 8)
    # Bytes of each sequence from its first bit on, 16 bits before them.
    into = (begins & 7).astype(np.uint16)[:, None]
    place = np.minimum((begins >> 3)[:, None] + np.arange(nbytes), len(pairs) - 1)
    bytes_RB = np.zeros((len(begins), 2 + nbytes + 4), np.uint32)
    bytes_RB[:, 2 : 2 + nbytes] = (pairs.take(place) << into) >> 8
    if length >= SHORTEST:
        over = 8 * nbytes - count
        last = bytes_RB[:, nbytes - 1] << 16 | bytes_RB[:, nbytes] << 8 | bytes_RB[:, nbytes + 1]
        last >>= over
        bytes_RB[:, 0], bytes_RB[:, 1] = last >> 8 & 255, last & 255
    words_RB = bytes_RB[:, :-3] << 24
    for later in range(1, 4):
        words_RB |= bytes_RB[:, later : bytes_RB.shape[1] - 3 + later] << (24 - 8 * later)
    found_RT = np.empty((len(begins), length), np.uint8)
    period = 8 * PERIOD
    steps = steps_of(code.rate, min(period, length))
    for t, end in enumerate(np.cumsum(steps).tolist()):
        first = 16 + end - code.state_bits
        some = words_RB[:, first >> 3 :: round(code.rate * PERIOD)][:, : -(-(length - t) // period)]
        states = some >> (32 - code.state_bits - (first & 7)) & ((1 << code.state_bits) - 1)
        found_RT[:, t::period] = code.table[0 if steps[t] else 1].take(states)
    return found_RT


def states_of(symbols_RT: np.ndarray, code: TrellisCode) -> np.ndarray:
    """Return the state of every step, uint16 (R, T), of sequences by their new bits (R, T)."""
    steps = steps_of(code.rate, symbols_RT.shape[1]).tolist()
    mask, state_R = np.uint32((1 << code.state_bits) - 1), np.zeros(len(symbols_RT), np.uint32)
    symbols_TR = np.ascontiguousarray(symbols_RT.T)
    # The bits at the end are the state before the first step.
    last, taken = len(steps), 0
    while len(steps) >= SHORTEST and taken < code.state_bits:
        last -= 1
        taken += steps[last]
    states_TR = np.empty(symbols_TR.shape, np.uint16)
    for t in [*range(last, len(steps)), *range(len(steps))]:
        state_R = (state_R << np.uint32(steps[t]) | symbols_TR[t]) & mask
        states_TR[t] = state_R
    return np.ascontiguousarray(states_TR.T)


def level_indices(symbols_RT: np.ndarray, code: TrellisCode) -> np.ndarray:
    """Return the level of every number, uint8 (R, T), of sequences by their new bits (R, T)."""
    states_RT = states_of(symbols_RT, code)
    table_T = np.resize(np.array([bits == 0 for bits in code.pattern], np.uint8), states_RT.shape[1])
    return code.table[table_T, states_RT]
