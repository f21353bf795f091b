"""Peak memory of statistics, plan and packing of one layer, above what the process held with the layer in memory.

``python -m benchmarks.memory [--rows 4096] [--columns 11008]``; the bound is four times the layer's bf16 bytes.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor

import psutil
import torch

from bivlm.compression import pack_layer
from bivlm.memory import peak_bytes, reset_peak
from bivlm.methods import MethodSettings, method
from bivlm.statistics import LayerStatistics


def main(arguments: Sequence[str] | None = None) -> int:
    """Print one row a recipe setting; returns 1 if one is above the bound."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=11008)
    options = parser.parse_args(arguments)
    largest, nbytes = 0.0, 2 * options.rows * options.columns
    for groups, p_max in ((1, 0.01), (2, 0.01), (2, 0.05), (5, 0.01), (5, 0.05)):
        # A process of its own: memory that an earlier case freed may stay with it and hide what this one needs.
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            above = pool.submit(_peak, options.rows, options.columns, groups, p_max).result() / nbytes
        largest = max(largest, above)
        print(f"groups {groups}, p_max {p_max:.0%}: {above:.2f} times the layer's {nbytes / 1e6:.0f} MB")
    print(f"largest {largest:.2f}; bound 4")
    return int(largest >= 4)


def _peak(rows: int, columns: int, groups: int, p_max: float) -> int:
    """Bytes above the baseline, which is the process with the layer in memory and a small layer done before."""
    settings = method("bivlm").Settings.model_validate({"method": "bivlm", "groups": groups, "p_max": p_max})
    _pack(torch.randn(64, 64).to(torch.bfloat16), settings)
    weight = torch.empty(rows, columns, dtype=torch.bfloat16)
    for row in weight:
        row.copy_(torch.randn(columns))
    before = psutil.Process().memory_info().rss
    if not reset_peak():
        print("this system cannot reset a process's peak memory; the figures count from its start")
    _pack(weight, settings)
    return peak_bytes() - before


def _pack(weight: torch.Tensor, settings: MethodSettings) -> None:
    plan = method(settings.method).plan(LayerStatistics.measure(weight, settings.p_max), settings)
    pack_layer(weight, plan)


if __name__ == "__main__":
    sys.exit(main())
