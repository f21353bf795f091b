"""Speed of products straight from packed bytes, as ratios to torch: ``python -m benchmarks.products [--tokens 1 8]``.

The linear layers of one decoder layer of Qwen2.5-7B, each of random bits: quantile groups without and with 1 % of
salient weights, grouped integers, and a trellis of 2^12 states. They are multiplied in float32, beside
`torch.nn.Linear` in bfloat16 and float32: interleaved, medians of several runs of CPU and of wall time. Every run takes
another copy of the weight, of so many that none is still in a cache, as in a model that is much larger than those.

With ``--device cuda`` wall time is what lies between two events of the GPU: it waits for the host where that takes
longer to start kernels than they run. Inputs are then bfloat16, which products turn to float32 themselves.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import get_args

import numpy as np
import torch

from benchmarks.peers.by_ggml import TYPES, Ggml
from bivlm.numerics.trellis import steps_of
from bivlm.numerics.trellis_tiles import Tiles
from bivlm.numerics.uniform_grid import round_to_nearest
from bivlm.packing import Activations, grouped, product, quantile, side_table, trellis

LAYER = {(3584, 3584): 2, (512, 3584): 2, (18944, 3584): 2, (3584, 18944): 1}
RUNS = 7
SALIENT = 0.01
COLD = 1 << 28  # bytes of copies


def in_quantile_groups(shape: tuple[int, int], groups: int, share: float) -> torch.Tensor:
    """Return a packed weight of random groups and signs, and of this share of salient weights of two bits."""
    rng, size = np.random.default_rng(0), shape[0] * shape[1]
    positions = np.flatnonzero(rng.random(size, dtype=np.float32) < share)
    return quantile.pack(
        shape,
        torch.bfloat16,
        quantile.ready(torch.from_numpy(rng.integers(0, 2 * groups, shape, dtype=np.uint8))),
        group_scales_K=np.linspace(0.5, 2.0, groups),
        salient_bits=2,
        positions_S=positions,
        levels_S=rng.integers(0, 4, len(positions)),
        centres_L=np.linspace(-3, 3, 4),
        row_scales_M=np.ones(shape[0]),
    )


def in_grouped_integers(shape: tuple[int, int], bits: int) -> torch.Tensor:
    """Return a packed Gaussian weight in groups of 128."""
    return grouped.pack(round_to_nearest(torch.randn(shape), bits, 128), torch.bfloat16)


def on_a_trellis(shape: tuple[int, int], rate: float, sides: int) -> torch.Tensor:
    """Return a packed weight of random bits, rotated on both sides."""
    layout = trellis.Layout(12, rate, sides, trellis.INPUTS | trellis.OUTPUTS, 0)
    steps = np.concatenate([steps_of(rate, length) for length in Tiles(shape, sides).lengths.tolist()])
    symbols = np.random.default_rng(0).integers(0, 8, len(steps), dtype=np.uint8) & ((1 << steps) - 1)
    magnitudes = trellis.stored_magnitudes(layout.code.magnitudes / shape[1] ** 0.5, 0)
    return trellis.pack(symbols.astype(np.uint8), magnitudes, layout, shape, exponent=0, dtype=torch.bfloat16)


KINDS: dict[str, Callable[[tuple[int, int]], torch.Tensor]] = {
    **{f"{groups} groups": partial(in_quantile_groups, groups=groups, share=0.0) for groups in (1, 2, 3, 5)},
    "2 groups, salient weights": partial(in_quantile_groups, groups=2, share=SALIENT),
    **{f"{bits} bits in groups of 128": partial(in_grouped_integers, bits=bits) for bits in (2, 3, 4, 8)},
    **{
        f"trellis {rate}, feedback to {'inputs' if sides == 1 else 'both'}": partial(
            on_a_trellis, rate=rate, sides=sides
        )
        for rate in (1.5, 2.0, 3.0)
        for sides in (1, 2)
    },
}


def torch_products(shape: tuple[int, int], tokens: int, device: str) -> dict[str, Callable[[], object]]:
    """Return products of an ordinary layer in several dtypes, by name."""
    works: dict[str, Callable[[], object]] = {}
    for dtype in (torch.bfloat16, torch.float32, *([torch.float16] if device == "cuda" else [])):
        x_TN = torch.randn(tokens, shape[1], dtype=dtype, device=device)
        weights = _copies(torch.randn(shape, dtype=dtype, device=device))
        name = f"torch {str(dtype).removeprefix('torch.')}"
        works[name] = lambda x_TN=x_TN, weights=weights: torch.nn.functional.linear(x_TN, next(weights))
    return works


def packed_products(
    shape: tuple[int, int], tokens: int, kinds: list[str], activations: Activations, device: str
) -> dict[str, Callable[[], object]]:
    """Return products of a packed weight of each kind, by name; raises ValueError where this machine has none."""
    works: dict[str, Callable[[], object]] = {}
    for kind in kinds:
        packed = KINDS[kind](shape).to(device)
        if (beside := side_table(packed)) is None:
            raise ValueError(f"{kind}: no product straight from the bytes: no native code or AVX2, or no Triton")
        x_TN = torch.randn(tokens, shape[1], dtype=torch.float32 if device == "cpu" else torch.bfloat16, device=device)
        pairs = zip(_copies(packed), _copies(beside, _count(packed.nbytes)), strict=True)
        works[kind] = lambda x_TN=x_TN, pairs=pairs: product(*next(pairs), x_TN, activations=activations)
    return works


def ggml_products(folder: Path, shape: tuple[int, int], tokens: int) -> dict[str, Callable[[], object]]:
    """Return products of llama.cpp's weights in blocks of 256, by name."""
    ggml, size = Ggml(folder, torch.get_num_threads()), shape[0] * shape[1] // 256
    counts = {kind: _count(size * nbytes) for kind, (_, nbytes, _) in TYPES.items()}
    return {f"llama.cpp {kind}": ggml.products(kind, shape, tokens, count) for kind, count in counts.items()}


def _copies(weight: torch.Tensor, count: int = 0) -> Iterator[torch.Tensor]:
    """Return copies without end, one after the other."""
    return cycle([weight.clone() for _ in range(count or _count(weight.nbytes))])


def _count(nbytes: int) -> int:
    return min(RUNS, -(-COLD // max(1, nbytes)))


def measured(works: dict[str, Callable[[], object]], device: str) -> dict[str, tuple[float, float]]:
    """Return the medians of CPU and wall seconds of each."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in works}
    if device == "cuda":  # kernels are compiled, and the bytes of each copy looked at
        for work in works.values():
            for _ in range(RUNS):
                work()
    for _ in range(RUNS):
        for name, work in works.items():
            seconds[name].append(_seconds(work) if device == "cpu" else _gpu_seconds(work))
    return {name: (median(c for c, _ in all), median(w for _, w in all)) for name, all in seconds.items()}


def _seconds(work: Callable[[], object]) -> tuple[float, float]:
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    return time.process_time() - cpu, time.perf_counter() - wall


def _gpu_seconds(work: Callable[[], object]) -> tuple[float, float]:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    cpu = time.process_time()
    begin.record()
    work()
    end.record()
    cpu = time.process_time() - cpu
    end.synchronize()
    return cpu, begin.elapsed_time(end) / 1e3


def main() -> None:
    """Print a table for every number of tokens."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--activations", choices=get_args(Activations), default="float32")
    parser.add_argument("--ggml", type=Path, metavar="FOLDER", help="of llama.cpp's libraries, to be run beside")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    given = parser.parse_args()
    torch.set_grad_enabled(False)
    for tokens in given.tokens:
        totals: dict[str, np.ndarray] = {}
        for shape, count in LAYER.items():
            works = torch_products(shape, tokens, given.device)
            works |= packed_products(shape, tokens, given.kinds, given.activations, given.device)
            if given.ggml:
                works |= ggml_products(given.ggml, shape, tokens)
            for name, seconds in measured(works, given.device).items():
                totals[name] = totals.get(name, np.zeros(2)) + count * np.array(seconds)
        base = totals["torch bfloat16"]
        where = f"{torch.get_num_threads()} threads" if given.device == "cpu" else "GPU"
        head = f"{tokens} tokens, {given.activations}, {where}"
        print(f"{head:<32}{'CPU ms':>8}{'x bf16':>8}{'wall ms':>9}{'x bf16':>8}")
        for name, (cpu, wall) in totals.items():
            print(f"{name:<32}{1e3 * cpu:8.1f}{base[0] / cpu:8.2f}{1e3 * wall:9.1f}{base[1] / wall:8.2f}", flush=True)


if __name__ == "__main__":
    main()
