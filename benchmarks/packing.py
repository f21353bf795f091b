"""How fast a layer's dense part is packed, unpacked and checked, in weights a second, and the whole layer beside it.

``python -m benchmarks.packing [--rows 4096] [--columns 11008]``; at least 100 million weights a second on two cores.
"""

from __future__ import annotations

import argparse
import platform
import sys
import timeit
from collections.abc import Callable, Sequence
from statistics import median

import torch

from bivlm.methods import method
from bivlm.numerics.weight_statistics import LayerStatistics
from bivlm.packing import open_packed, unpack

REPEATS = 5


def main(arguments: Sequence[str] | None = None) -> int:
    """Print one row a number of groups; returns 1 if a dense rate is below the bound."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.packing", description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=11008)
    options = parser.parse_args(arguments)
    bivlm, slowest = method("bivlm"), float("inf")
    weight = torch.randn(options.rows, options.columns, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    print(f"{options.rows}x{options.columns} bfloat16, {torch.get_num_threads()} threads, {platform.machine()}")
    columns = f"{'unpack':>8}{'check':>8}"
    print(f"{'million weights a second':<26}{'pack dense':>12}{columns}{'pack 1 %':>10}{columns}")
    for groups in (1, 2, 3, 5, 6):
        rates = []
        for p_max in (0.0, 0.01):
            settings = bivlm.Settings.model_validate({"method": "bivlm", "groups": groups, "p_max": p_max})
            plan = bivlm.plan(LayerStatistics.measure(weight, p_max), settings)
            packed = bivlm.quantize(weight, plan).packed
            rates.append(_rate(weight, lambda plan=plan: bivlm.quantize(weight, plan)))
            rates.append(_rate(weight, lambda packed=packed: unpack(packed, check=False)))
            rates.append(_rate(weight, lambda packed=packed: open_packed(packed)))
        slowest = min(slowest, *rates[:2])
        print(
            f"{groups:>2} groups{'':<17}"
            + "".join(f"{r:>{w}.0f}" for r, w in zip(rates, (12, 8, 8, 10, 8, 8), strict=True))
        )
    print(f"slowest dense rate {slowest:.0f} million weights a second; bound 100")
    return int(slowest < 100)


def _rate(weight: torch.Tensor, work: Callable[[], object]) -> float:
    return weight.numel() / median(timeit.repeat(work, number=1, repeat=REPEATS)) / 1e6


if __name__ == "__main__":
    sys.exit(main())
