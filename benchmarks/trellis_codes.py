"""Train the free tables of the trellis on a unit Gaussian: ``python -m benchmarks.trellis_codes [--state-bits 14 16]``.

Where paths part and where they meet again, their levels should lie far apart (Ungerboeck, "Channel coding with
multilevel/phase signals", 1982). So a state's place in the order of all levels begins with bits that differ between the
states that follow one state, and between those that lead to one: bit i of it is ``new bit i xor oldest bit i``, xor a
random bit of what else the state holds; the rest of the order is random. Against an order that is random throughout
this saves 3 to 4 % of the error at two bits, as much as four times the states. Lloyd's steps follow: of every state the
mean of the numbers that came to it, of every group of magnitudes the mean.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np

from bivlm.numerics import trellis
from bivlm.numerics.trellis import FREE_STATE_BITS, MAGNITUDES, RATES, TrellisCode, levels_of, pattern

LENGTH = 256
SPREAD_BITS = 3  # of a state's place that are spread between neighbours on the trellis
PRIOR = 4.0  # numbers, as which a state's level so far counts beside those that came to it


def first_table(state_bits: int, rng: np.random.Generator) -> np.ndarray:
    """Return a level for every state, float64 (2^L,): quantiles of a Gaussian in the order of the docstring."""
    states = np.arange(1 << state_bits)
    middle = (states >> SPREAD_BITS) & ((1 << (state_bits - 2 * SPREAD_BITS)) - 1)
    order = np.zeros(len(states), np.int64)
    for i in range(SPREAD_BITS):
        new, oldest = (states >> i) & 1, (states >> (state_bits - 1 - i)) & 1
        used = (states & ((1 << i) - 1)) << i | states >> (state_bits - i)
        random = rng.integers(0, 2, 1 << (state_bits - 2 * SPREAD_BITS + 2 * i))
        order = 2 * order + (new ^ oldest ^ random[middle << 2 * i | used])
    places = np.empty(len(states))
    for part in range(1 << SPREAD_BITS):
        inside = np.flatnonzero(order == part)
        places[inside] = part * len(inside) + rng.permutation(len(inside))
    return quantile((places + 0.5) / len(states))


def quantile(share: np.ndarray) -> np.ndarray:
    """Return the standard normal distribution's quantiles."""
    from scipy.stats import norm

    return norm.ppf(share)


def first_magnitudes(rng: np.random.Generator) -> np.ndarray:
    """Return the means of eight groups of a Gaussian's magnitudes, of least squared error."""
    numbers = np.sort(np.abs(rng.standard_normal(1 << 19)))
    magnitudes = np.quantile(numbers, (np.arange(MAGNITUDES) + 0.5) / MAGNITUDES)
    for _ in range(200):
        groups = np.split(numbers, np.searchsorted(numbers, (magnitudes[1:] + magnitudes[:-1]) / 2))
        magnitudes = np.array([group.mean() for group in groups])
    return magnitudes


def train(state_bits: int, rate: float, rounds: int, sequences: int, seed: int) -> TrellisCode:
    """Return a code trained on `sequences` fresh sequences in each round; the same for the same seed."""
    rng = np.random.default_rng([seed, state_bits, round(4 * rate)])
    tables = 1 + (0 in pattern(rate))
    level = np.stack([0.97 * first_table(state_bits, rng) for _ in range(tables)])
    magnitudes = first_magnitudes(rng)
    after = np.array([pattern(rate)[t % 4] == 0 for t in range(LENGTH)], np.int64)
    code, best = None, None
    for _ in range(rounds):
        group = np.searchsorted((magnitudes[1:] + magnitudes[:-1]) / 2, np.abs(level))
        table = np.broadcast_to(group + MAGNITUDES * (level < 0), (2, 1 << state_bits)).astype(np.uint8)
        code = TrellisCode(state_bits, rate, np.ascontiguousarray(table), magnitudes.astype(np.float32), 0.0)
        x, states, index = run(code, rng, sequences)
        error = float(np.square(x - levels_of(magnitudes)[index]).mean())
        best = replace(code, error=error) if best is None or error < best.error else best
        places = (states + (after << state_bits if tables == 2 else 0)).reshape(-1)
        counts = np.bincount(places, minlength=level.size).reshape(level.shape)
        sums = np.bincount(places, x.reshape(-1), minlength=level.size).reshape(level.shape)
        level = (sums + PRIOR * level) / (counts + PRIOR)
        unsigned = np.where(index < MAGNITUDES, x, -x)
        sums = np.bincount((index % MAGNITUDES).reshape(-1), unsigned.reshape(-1), minlength=MAGNITUDES)
        counts = np.bincount((index % MAGNITUDES).reshape(-1), minlength=MAGNITUDES)
        magnitudes = np.sort(np.abs(sums / np.maximum(counts, 1)))
    assert best is not None
    fresh = np.random.default_rng([seed + 1, state_bits, round(4 * rate)])
    x, _, index = run(best, fresh, sequences)
    return replace(best, error=float(np.square(x - levels_of(best.magnitudes)[index]).mean()))


def run(code: TrellisCode, rng: np.random.Generator, sequences: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return Gaussian sequences, and of every number the state and the level that the search gives it."""
    x = rng.standard_normal((sequences, LENGTH), dtype=np.float32)
    symbols, indices = trellis.search(x, code, levels_of(code.magnitudes))
    return x, trellis.states_of(symbols, code), indices


def main() -> None:
    """Train and write the codes that are asked for; print their errors."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--state-bits", type=int, nargs="+", choices=FREE_STATE_BITS, default=list(FREE_STATE_BITS))
    parser.add_argument("--rates", type=float, nargs="+", choices=RATES, default=list(RATES))
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--sequences", type=int, default=4000)
    parser.add_argument("--output", type=Path, default=Path(trellis.__file__).parent / "trellis_codes")
    given = parser.parse_args()
    given.output.mkdir(parents=True, exist_ok=True)
    for state_bits in given.state_bits:
        for rate in given.rates:
            code = train(state_bits, rate, given.rounds, given.sequences, seed=0)
            (given.output / f"{state_bits}-{rate}.bin").write_bytes(trellis.to_bytes(code))
            print(f"2^{state_bits} states, {rate:4} bits: mean squared error {code.error:.4f}", flush=True)


if __name__ == "__main__":
    main()
