"""What GPTQ costs beside its linear algebra: from a weight and a second moment to codes, packing not included.

``python -m benchmarks.feedback [--rows 4096] [--columns 4096]``; at most 1.5 times the factorization (Cholesky), the
triangular inverse and the matrix products that feed errors forward, each done by torch alone on the same shapes.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Callable, Iterator, Sequence

import torch

from benchmarks.timing import medians
from bivlm.methods import method
from bivlm.methods.gptq import feed_back_groups
from bivlm.numerics.error_feedback import SUB_BLOCK, inverse_factor
from bivlm.numerics.input_statistics import SiteStatistics
from bivlm.numerics.weight_statistics import LayerStatistics

BOUND = 1.5
REPEATS = 7


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the ratio and the seconds of its parts; returns 1 if the bound is missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.feedback", description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--group-size", type=int, default=64)
    options = parser.parse_args(arguments)
    rows, columns = options.rows, options.columns
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator)
    x = torch.randn(2 * columns, columns, generator=generator) * torch.rand(columns, generator=generator)
    moment = x.T @ x / len(x)
    lower, identity = torch.linalg.cholesky(moment), torch.eye(columns)
    settings = method("gptq").Settings(method="gptq", bits=options.bits, group_size=options.group_size)
    plan = method("gptq").plan(LayerStatistics.measure(weight, 0.0), settings)
    inputs = SiteStatistics(moment, x.mean(0), x.abs().mean(0), {"text": len(x)})
    work = {
        "cholesky": lambda: torch.linalg.cholesky_ex(moment),
        "inverse": lambda: torch.linalg.solve_triangular(lower, identity, upper=False),
        "products": _products(weight, moment, options.group_size),
        "codes": lambda: feed_back_groups(weight, inverse_factor(moment).upper_NN, options.bits, options.group_size),
        "packed": lambda: method("gptq").quantize(weight, plan, inputs),
    }
    seconds = medians(work, REPEATS)
    least = seconds["cholesky"] + seconds["inverse"] + seconds["products"]
    ratio = seconds["codes"] / least
    print(
        f"{rows}x{columns} w{options.bits}g{options.group_size}, {torch.get_num_threads()} threads of "
        f"{os.cpu_count()} cores, {platform.machine()}: codes in {seconds['codes']:.2f} s, {ratio:.2f} times "
        f"{least:.2f} s (Cholesky {seconds['cholesky']:.2f}, triangular inverse {seconds['inverse']:.2f}, "
        f"products {seconds['products']:.2f}); bound {BOUND}; packed in {seconds['packed']:.2f} s"
    )
    return int(ratio > BOUND)


def _products(weight: torch.Tensor, upper: torch.Tensor, group_size: int) -> Callable[[], None]:
    """The products of error feedback on a weight (M, N): by halves down to groups, then down to sub-blocks."""
    columns = len(upper)
    running, carried = weight.T.contiguous(), torch.zeros(columns, len(weight))
    width = min(group_size or columns, columns)
    shapes = list(_halves(0, columns, width))
    for begin in range(0, columns, width):
        shapes += _halves(begin, min(begin + width, columns), SUB_BLOCK)

    def run() -> None:
        for begin, middle, end in shapes:
            running[middle:end].addmm_(upper[begin:middle, middle:end].T, carried[begin:middle], alpha=-1)

    return run


def _halves(begin: int, end: int, block: int) -> Iterator[tuple[int, int, int]]:
    blocks = -(-(end - begin) // block)
    if blocks > 1:
        middle = begin + (blocks + 1) // 2 * block
        yield from _halves(begin, middle, block)
        yield begin, middle, end
        yield from _halves(middle, end, block)


if __name__ == "__main__":
    sys.exit(main())
