"""Stored bits of the reference model's linears, at p_max 1 % everywhere and as the recipes ship, counted from files.

``python -m benchmarks.bits [--model DIR]``
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from bivlm.checkpoint.linears import linears
from bivlm.checkpoint.reading import Checkpoint
from bivlm.checkpoint.writing import write_packed_checkpoint
from bivlm.compression.layer import pack_layer
from bivlm.methods import method
from bivlm.numerics.weight_statistics import LayerStatistics
from bivlm.recipe.loading import Recipe, parse_recipe
from bivlm.recipe.selection import select
from bivlm.reference import CHECKPOINT
from bivlm.reports.bits import bits_of

BOUNDS = {(1, "1 % everywhere"): 1.25, (2, "1 % everywhere"): 2.25, (5, "1 % everywhere"): 3.6}
BOUNDS |= {(1, "5 % vision"): 1.4, (2, "5 % vision"): 2.4, (5, "5 % vision"): 3.75}


def main(arguments: Sequence[str] | None = None) -> int:
    """Print nominal, entropy and stored bits of each case; returns 1 if one is at or above its bound."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bits", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default=CHECKPOINT, type=Path)
    options = parser.parse_args(arguments)
    missed = 0
    for (groups, shares), bound in BOUNDS.items():
        with tempfile.TemporaryDirectory() as place:
            bits = _compress(options.model, _recipe(groups, shares), Path(place) / "packed")
        found = bits["linears"]
        missed += found["stored"] >= bound
        print(
            f"groups {groups}, p_max {shares:<14} nominal {found['nominal']:.3f}  entropy {found['entropy']:.3f}  "
            f"stored {found['stored']:.3f}  bound {bound}  whole model {bits['model']['stored']:.3f}"
        )
    return int(missed > 0)


def _recipe(groups: int, shares: str) -> Recipe:
    visual = 0.05 if shares == "5 % vision" else 0.01
    settings = {"method": "bivlm", "groups": groups, "refit": groups != 5}
    components = {"vision": visual, "adaptor": visual, "language": 0.01}
    return parse_recipe(
        {
            "name": "bits",
            "format": 1,
            "components": {name: settings | {"p_max": p_max} for name, p_max in components.items()},
        }
    )


def _compress(model: Path, recipe: Recipe, output: Path) -> dict:
    checkpoint = Checkpoint.open(model)
    chosen, _ = select(linears(checkpoint), recipe)
    packed = {}
    for linear in chosen:
        settings = recipe.components[linear.component]
        chosen_method = method(settings.method)
        weight = checkpoint.read(linear.disk_name)
        statistics = LayerStatistics.measure(weight, chosen_method.tail_share(settings), linear.name)
        packed[linear.name], _ = pack_layer(weight, chosen_method.plan(statistics, settings), linear.name)
    sources = {name: (lambda tensor=tensor: tensor) for name, tensor in packed.items()}
    write_packed_checkpoint(checkpoint, sources, chosen, output, {}, {})
    return bits_of(output)


if __name__ == "__main__":
    sys.exit(main())
