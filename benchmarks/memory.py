"""Peak memory of statistics, plan and packing of one layer, above what the process held with the layer in memory.

``python -m benchmarks.memory [--rows 4096] [--columns 11008]``; the bound is four times the layer's bf16 bytes.
With ``--methods`` every shipped recipe's method, beside what `bivlm.compression.estimate` says; its estimate is the
bound.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch

from bivlm.compression.estimate import layer_bytes
from bivlm.compression.layer import pack_layer
from bivlm.methods import method
from bivlm.methods.base import MethodSettings
from bivlm.numerics.input_statistics import SiteStatistics
from bivlm.numerics.weight_statistics import LayerStatistics
from bivlm.recipe.loading import load_recipe, shipped_recipes
from bivlm.workspace.environment import peak_bytes, reset_peak


def main(arguments: Sequence[str] | None = None) -> int:
    """Print one row a recipe setting; returns 1 if one is above the bound."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=11008)
    parser.add_argument("--methods", action="store_true", help="those of all shipped recipes, beside the estimate")
    options = parser.parse_args(arguments)
    if options.methods:
        return _all_methods(options.rows, options.columns)
    largest, nbytes = 0.0, 2 * options.rows * options.columns
    for groups, p_max in ((1, 0.01), (2, 0.01), (2, 0.05), (5, 0.01), (5, 0.05)):
        # A process of its own: memory that an earlier case freed may stay with it and hide what this one needs.
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            said = {"method": "bivlm", "groups": groups, "p_max": p_max}
            above = pool.submit(_peak, options.rows, options.columns, said).result() / nbytes
        largest = max(largest, above)
        print(f"groups {groups}, p_max {p_max:.0%}: {above:.2f} times the layer's {nbytes / 1e6:.0f} MB")
    print(f"largest {largest:.2f}; bound 4")
    return int(largest >= 4)


def _all_methods(rows: int, columns: int) -> int:
    """Print one row a method's settings; returns 1 if one takes more than is estimated."""
    found = {
        str(said): said for name in shipped_recipes() for said in load_recipe(name).canonical()["components"].values()
    }
    worst = 0.0
    for said in found.values():
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            peak = pool.submit(_peak, rows, columns, said).result()
        settings = method(said["method"]).Settings.model_validate(said)
        told = layer_bytes((rows, columns), settings)
        worst = max(worst, peak / told)
        short = ", ".join(f"{key} {value}" for key, value in said.items() if key not in ("method", "salient_grid"))
        print(f"{said['method']}: {peak / 1e6:.0f} MB, estimated {told / 1e6:.0f} MB ({short})", flush=True)
    print(f"largest part of an estimate {worst:.2f}; bound 1")
    return int(worst >= 1)


def _peak(rows: int, columns: int, said: dict[str, Any]) -> int:
    """Bytes above the baseline, which is the process with the layer in memory and a small layer done before.

    Input statistics are read from a file, as in a run.
    """
    settings = method(said["method"]).Settings.model_validate(said)
    with tempfile.TemporaryDirectory() as folder:
        small, large = Path(folder, "small"), Path(folder, "large")
        for file, size in ((small, 64), (large, columns)):
            moment = torch.full((size, size), 0.5)
            moment.diagonal().copy_(torch.rand(size) + 1)
            SiteStatistics(moment, torch.zeros(size), torch.ones(size), {"text": size}).save(file)
            del moment
        _pack(torch.randn(64, 64).to(torch.bfloat16), settings, small)
        weight = torch.empty(rows, columns, dtype=torch.bfloat16)
        for row in weight:
            row.copy_(torch.randn(columns))
        before = psutil.Process().memory_info().rss
        if not reset_peak():
            print("this system cannot reset a process's peak memory; the figures count from its start")
        _pack(weight, settings, large)
        return peak_bytes() - before


def _pack(weight: torch.Tensor, settings: MethodSettings, inputs_file: Path) -> None:
    chosen = method(settings.method)
    plan = chosen.plan(LayerStatistics.measure(weight, chosen.tail_share(settings)), settings)
    inputs, needs = None, chosen.needs(settings)
    if "inputs" in needs:
        inputs = SiteStatistics.load(inputs_file)
        if "gradients" in needs:
            inputs = replace(inputs, gradient_square_MN=torch.rand(weight.shape))
    pack_layer(weight, plan, inputs=inputs)


if __name__ == "__main__":
    sys.exit(main())
