"""Train the tables by windows of the trellis on a unit Gaussian: ``python -m benchmarks.trellis_windows``.

A state's place in the order of all levels is the exclusive or of what tables say of its windows of four bits. Where
paths part and where they meet again, their levels should lie far apart (Ungerboeck, "Channel coding with
multilevel/phase signals", 1982): so a step's newest bits, and the oldest, begin as the upper bits of the place, and all
else is random. Then, again and again: a few entries are changed at random; of every state the sums of the numbers
that came to it say which other entries, and which magnitudes, err less (Lloyd's step); what errs more is taken back.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from benchmarks.trellis_codes import LENGTH, first_magnitudes
from bivlm.numerics import trellis
from bivlm.numerics.trellis import (
    INDEX_OF_PLACE,
    LEVELS,
    MAGNITUDES,
    PLACES,
    RATES,
    WINDOW_CODES,
    WINDOWS,
    TrellisCode,
    levels_of,
    of_windows,
    pattern,
)


@dataclass(frozen=True)
class Trained:
    """A code and the sums over the numbers of each state: how many, their sum; and of each level."""

    code: TrellisCode
    states_2S: tuple[np.ndarray, np.ndarray]
    levels: tuple[np.ndarray, np.ndarray]


def first_code(rate: float, rng: np.random.Generator) -> TrellisCode:
    """Return a code to begin with."""
    windows = rng.integers(0, PLACES, (2, len(WINDOWS), 16), dtype=np.uint8)
    bits = max(2, *pattern(rate))
    window, rest, up = np.arange(16), (1 << 4 - bits) - 1, PLACES.bit_length() - 1 - bits
    for each in windows:
        each[0] = (window & (1 << bits) - 1) << up ^ rng.integers(0, PLACES, 16)[window >> bits]
        each[-1] = (window >> 4 - bits) << up ^ rng.integers(0, PLACES, 16)[window & rest]
    return of_windows(windows, first_magnitudes(np.random.default_rng(0)).astype(np.float32), rate, 1.0)


def measured(code: TrellisCode, x_RT: np.ndarray) -> Trained:
    """Return the code with its error on sequences of unit variance, and the sums that a better one follows from."""
    levels = levels_of(code.magnitudes)
    symbols, index = trellis.search(x_RT, code, levels)
    error = float(np.square(x_RT - levels[index]).mean())
    after = np.array([code.pattern[t % 4] == 0 for t in range(x_RT.shape[1])], np.int64)
    place = ((after << code.state_bits) + trellis.states_of(symbols, code)).ravel()
    sums = [
        (np.bincount(key, minlength=size), np.bincount(key, x_RT.ravel(), minlength=size))
        for key, size in ((place, 2 << code.state_bits), (index.ravel(), LEVELS))
    ]
    return Trained(replace(code, error=error), *sums)


def improved(trained: Trained, rng: np.random.Generator) -> TrellisCode:
    """Return the code after a Lloyd's step: entries one by one as long as sums stay, magnitudes to their means."""
    code, (counts, sums) = trained.code, trained.levels
    means = (sums[:MAGNITUDES] - sums[MAGNITUDES:]) / np.maximum(1, counts[:MAGNITUDES] + counts[MAGNITUDES:])
    magnitudes = np.sort(np.where(means > 0, means, code.magnitudes)).astype(np.float32)
    levels = levels_of(magnitudes)[INDEX_OF_PLACE]
    tables, states = code.windows.copy(), np.arange(1 << code.state_bits)
    windows = states >> np.array(WINDOWS)[:, None] & 15
    for kind in range(1 + (0 in code.pattern)):
        counts, sums = (each.reshape(2, -1)[kind][:, None] for each in trained.states_2S)
        cost = counts * levels**2 - 2 * sums * levels
        place = np.bitwise_xor.reduce(np.take_along_axis(tables[kind], windows, 1))
        for number in rng.permutation(len(windows)):
            for value in range(16):
                there = np.flatnonzero(windows[number] == value)
                change = cost[there[:, None], place[there][:, None] ^ np.arange(PLACES)].sum(0).argmin()
                tables[kind, number, value] ^= change
                place[there] ^= change.astype(np.uint8)
    return of_windows(tables, magnitudes, code.rate, code.error)


def changed(code: TrellisCode, rng: np.random.Generator) -> TrellisCode:
    """Return the code with one to three entries changed, or exchanged with another, at random."""
    windows = code.windows.copy()
    for _ in range(rng.integers(1, 4)):
        table = windows[rng.integers(0, 1 + (0 in code.pattern)), rng.integers(0, len(WINDOWS))]
        first, second = rng.integers(0, 16, 2)
        if rng.random() < 0.5:
            table[[first, second]] = table[[second, first]]
        else:
            table[first] ^= rng.integers(1, PLACES, dtype=np.uint8)
    return of_windows(windows, code.magnitudes, code.rate, code.error)


def train(code: TrellisCode, changes: int, x_RT: np.ndarray, rng: np.random.Generator) -> TrellisCode:
    """Return the best code after as many changes."""
    best = measured(code, x_RT).code
    for _ in range(changes):
        best = min(best, lloyd(changed(best, rng), x_RT, 2, rng), key=_error)
    return best


def lloyd(code: TrellisCode, x_RT: np.ndarray, steps: int, rng: np.random.Generator) -> TrellisCode:
    """Return the best code that `steps` searches find."""
    found = []
    for _ in range(steps):
        trained = measured(code, x_RT)
        found.append(trained.code)
        code = improved(trained, rng)
    return min(found, key=_error)


def sequences_of(number: int, rng: np.random.Generator) -> np.ndarray:
    """Return Gaussian sequences whose mean square is one, float32 (R, T)."""
    x_RT = rng.standard_normal((number, LENGTH), dtype=np.float32)
    return x_RT / np.sqrt(np.square(x_RT).mean())


def _error(code: TrellisCode) -> float:
    return code.error


def main() -> None:
    """Train the codes that are asked for, write each as soon as it is there, and print its error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", type=float, nargs="+", choices=RATES, default=list(RATES))
    parser.add_argument("--starts", type=int, default=20)
    parser.add_argument("--changes", type=int, default=400)
    parser.add_argument("--sequences", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=WINDOW_CODES, help="a file, of which other codes are kept")
    given = parser.parse_args()
    for rate in given.rates:
        rng = np.random.default_rng([given.seed, round(4 * rate)])
        x_RT = sequences_of(given.sequences, rng)
        first = min((lloyd(first_code(rate, rng), x_RT, 6, rng) for _ in range(given.starts)), key=_error)
        code = measured(train(first, given.changes, x_RT, rng), sequences_of(8 * given.sequences, rng)).code
        kept = json.loads(given.output.read_text()) if given.output.exists() else {}
        kept[str(rate)] = trellis.to_json(code)
        lines = ",\n".join(f'"{key}": {json.dumps(kept[key])}' for key in sorted(kept, key=float))
        given.output.write_text(f"{{\n{lines}\n}}\n")
        print(f"{rate:4} bits: mean squared error {code.error:.4f}", flush=True)


if __name__ == "__main__":
    main()
