"""What planning a layer costs: against one sort of it, and against the literal search, which re-quantizes it each time.

``python -m benchmarks.search [--rows 4096] [--columns 11008] [--no-literal]``; the literal search takes minutes.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

import torch

from benchmarks.timing import medians
from bivlm.methods import method
from bivlm.methods.base import LayerPlan
from bivlm.numerics.weight_statistics import LayerStatistics
from tests import literal

P_MAX = 0.01
REPEATS = 3


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the times and ratios; returns 1 if a bound is missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.search", description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=11008)
    parser.add_argument("--no-literal", action="store_true", help="leave out the literal search")
    options = parser.parse_args(arguments)
    weight = torch.randn(options.rows, options.columns, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    missed = 0
    for groups, refit in ((5, False), (2, True)):
        settings = method("bivlm").Settings.model_validate(
            {"method": "bivlm", "groups": groups, "p_max": P_MAX, "refit": refit}
        )
        work = {"sort": lambda: torch.sort(weight.flatten()), "plan": lambda settings=settings: _plan(weight, settings)}
        times = medians(work, REPEATS)
        share = times["plan"] / times["sort"]
        missed += share >= 0.25
        print(
            f"groups {groups}, refit {refit}: statistics and plan {times['plan']:.2f} s, "
            f"{share:.2f} of one sort ({times['sort']:.2f} s); bound 0.25"
        )
        if options.no_literal:
            continue
        begin = time.perf_counter()
        p_sal = literal.search(weight.double(), P_MAX, groups, refit=refit)
        seconds = time.perf_counter() - begin
        ratio = seconds / times["plan"]
        found = _plan(weight, settings).parameters["p_sal"]
        same = _cut_off_rank(weight, found) == _cut_off_rank(weight, p_sal)
        missed += ratio < 50 or not same
        print(
            f"  literal search {seconds:.1f} s, {ratio:.0f} times as long; bound 50; "
            f"p_sal {p_sal:.9f} against {found:.9f}, {'the same' if same else 'ANOTHER'} salient set"
        )
    return int(missed > 0)


def _plan(weight: torch.Tensor, settings) -> LayerPlan:
    return method("bivlm").plan(LayerStatistics.measure(weight, settings.p_max), settings)


def _cut_off_rank(weight: torch.Tensor, p_sal: float) -> int:
    statistics_ = LayerStatistics.measure(weight, 0)
    return statistics_.rank_above(statistics_.salient_cut_off(p_sal))


if __name__ == "__main__":
    sys.exit(main())
