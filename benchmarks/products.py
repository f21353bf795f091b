"""Speed of products straight from packed bytes, as ratios to torch: ``python -m benchmarks.products [--tokens 1 8]``.

The linear layers of one decoder layer of Qwen2.5-7B, each of random bits of a trellis of 2^12 states, in
float32, beside `torch.nn.Linear` in bfloat16 and float32: interleaved, medians of several runs of CPU and of wall time.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from statistics import median

import numpy as np
import torch

from bivlm.numerics.trellis import RATES, steps_of
from bivlm.numerics.trellis_tiles import Tiles
from bivlm.packing import product
from bivlm.packing.trellis import INPUTS, OUTPUTS, Layout, pack, stored_magnitudes

LAYER = {(3584, 3584): 2, (512, 3584): 2, (18944, 3584): 2, (3584, 18944): 1}
RUNS = 7


def packed_weight(shape: tuple[int, int], rate: float, sides: int) -> torch.Tensor:
    """Return a packed weight of random bits, rotated on both sides."""
    layout = Layout(12, rate, sides, INPUTS | OUTPUTS, 0)
    steps = np.concatenate([steps_of(rate, length) for length in Tiles(shape, sides).lengths.tolist()])
    symbols = np.random.default_rng(0).integers(0, 8, len(steps), dtype=np.uint8) & ((1 << steps) - 1)
    magnitudes = stored_magnitudes(layout.code.magnitudes / shape[1] ** 0.5, 0)
    return pack(symbols.astype(np.uint8), magnitudes, layout, shape, exponent=0, dtype=torch.bfloat16)


def torch_products(shape: tuple[int, int], tokens: int) -> dict[str, Callable[[], object]]:
    """Return products of an ordinary layer in two dtypes, by name."""
    works: dict[str, Callable[[], object]] = {}
    for dtype in (torch.bfloat16, torch.float32):
        linear = torch.nn.Linear(shape[1], shape[0], bias=False, dtype=dtype)
        x_TN = torch.randn(tokens, shape[1], dtype=dtype)
        works[f"torch {str(dtype).removeprefix('torch.')}"] = partial(linear, x_TN)
    return works


def packed_products(
    shape: tuple[int, int], tokens: int, kinds: list[tuple[float, int]]
) -> dict[str, Callable[[], object]]:
    """Return products of a packed weight of each rate and number of sides, by name."""
    return {
        f"{rate} bits, feedback to {'inputs' if sides == 1 else 'both'}": partial(
            product, packed_weight(shape, rate, sides), torch.randn(tokens, shape[1])
        )
        for rate, sides in kinds
    }


def measured(works: dict[str, Callable[[], object]]) -> dict[str, tuple[float, float]]:
    """Return the medians of CPU and wall seconds of each."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in works}
    for _ in range(RUNS):
        for name, work in works.items():
            cpu, wall = time.process_time(), time.perf_counter()
            work()
            seconds[name].append((time.process_time() - cpu, time.perf_counter() - wall))
    return {name: (median(c for c, _ in all), median(w for _, w in all)) for name, all in seconds.items()}


def main() -> None:
    """Print a table for every number of tokens."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rates", type=float, nargs="+", choices=RATES, default=[1.5, 2.0, 3.0])
    parser.add_argument("--sides", type=int, nargs="+", choices=(1, 2), default=[1, 2])
    given = parser.parse_args()
    torch.set_grad_enabled(False)
    kinds = [(rate, sides) for rate in given.rates for sides in given.sides]
    for tokens in given.tokens:
        totals: dict[str, np.ndarray] = {}
        for shape, count in LAYER.items():
            works = torch_products(shape, tokens) | packed_products(shape, tokens, kinds)
            for name, seconds in measured(works).items():
                totals[name] = totals.get(name, np.zeros(2)) + count * np.array(seconds)
        base = totals["torch bfloat16"]
        head = f"{tokens} tokens, {torch.get_num_threads()} threads"
        print(f"{head:<32}{'CPU ms':>8}{'x bf16':>8}{'wall ms':>9}{'x bf16':>8}")
        for name, (cpu, wall) in totals.items():
            print(f"{name:<32}{1e3 * cpu:8.1f}{base[0] / cpu:8.2f}{1e3 * wall:9.1f}{base[1] / wall:8.2f}", flush=True)


if __name__ == "__main__":
    main()
