"""The demo: the reference model, compressed by the three shipped recipes, in one table.

``python -m flows.demo --output demo`` needs no server and no network.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from flows.quiet import hide_loading_bars, quieten

RECIPES = ("bivlm-paper", "bivlm-1bit", "bivlm")  # the last one's page shows all three
QUESTIONS = 250


def main(arguments: Sequence[str] | None = None) -> int:
    """Compress, evaluate and print the table; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m flows.demo", description=__doc__.partition("\n")[0])
    parser.add_argument("--output", default="demo", type=Path, metavar="DIR", help="folder for all that the demo makes")
    parser.add_argument(
        "--questions", default=QUESTIONS, type=int, metavar="N", help="questions of every set (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    output = options.output.absolute()
    # Nothing that is installed or configured on this machine shall change what the demo does.
    home = output / "prefect"
    home.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("PREFECT_HOME", str(home))
    quieten()
    from bivlm.errors import InputError

    results = {}
    try:
        for number, recipe in enumerate(RECIPES, start=1):
            print(f"{number} of {len(RECIPES)}: {recipe}", file=sys.stderr)
            # A process of its own each, as `bivlm compress` is: none starts with the memory that another has left.
            with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as process:
                results[recipe] = process.submit(_compress, recipe, output, options.questions).result()
    except InputError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    _print(results)
    return 0


def _compress(recipe: str, output: Path, questions: int) -> dict[str, Any]:
    quieten()
    from bivlm.reference import CHECKPOINT
    from flows.compress import compress_flow
    from flows.local import temporary_server

    hide_loading_bars()
    with temporary_server():
        return compress_flow(
            model=str(CHECKPOINT),
            recipe=recipe,
            output=str(output / recipe),
            workspace=str(output / "workspace"),
            questions=questions,
        )


def _print(results: dict[str, dict[str, Any]]) -> None:
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(_table(results))
    last = results[RECIPES[-1]]
    print("KL is the mean over the tokens of the calibration replies, in nats; accuracy is in percent.")
    print("Seconds and peak memory are those of the compression, evaluation not included.")
    print(f"report: {last['page']}")
    print(f"MLflow: {last['mlflow']['ui']}")
    print(f"  then: {last['mlflow']['page']}")


def _table(results: dict[str, dict[str, Any]]) -> Any:
    from rich.table import Table

    from bivlm.bits import bits_of
    from bivlm.checkpoint import Checkpoint, linears
    from bivlm.evaluation.reference_sets import chance
    from bivlm.reference import CHECKPOINT

    first = results[RECIPES[0]]
    benchmarks = list(first["evaluation"]["packed"])
    table = Table(
        title=f"the reference model, {next(iter(first['evaluation']['packed'].values()))['n']} questions a set"
    )
    table.add_column("model", no_wrap=True)
    for benchmark in benchmarks:
        name = benchmark.partition(":")[2]
        table.add_column(f"{name}\n(chance {chance(name):.0f})", justify="right")
    headings = (
        "KL",
        "nominal\nbits",
        "entropy\nbits",
        "stored\nbits",
        "stored bits,\nwhole model",
        "seconds",
        "peak\nMB",
    )
    for heading in headings:
        table.add_column(heading, justify="right")

    checkpoint = Checkpoint.open(CHECKPOINT)
    width = {8 * linear.dtype.itemsize for linear in linears(checkpoint)}
    plain = f"{max(width):.0f}" if len(width) == 1 else "-"
    before = [f"{first['evaluation']['full_precision'][name]['metrics']['accuracy']:.1f}" for name in benchmarks]
    whole = f"{bits_of(CHECKPOINT)['model']['stored']:.2f}"
    table.add_row("full precision", *before, "0", plain, "-", plain, whole, "-", "-")
    most_bits_first = sorted(results.items(), key=lambda item: -item[1]["bits"]["linears"]["stored"])
    for recipe, result in most_bits_first:
        after = [f"{result['evaluation']['packed'][name]['metrics']['accuracy']:.1f}" for name in benchmarks]
        of_linears = result["bits"]["linears"]
        table.add_row(
            recipe,
            *after,
            f"{result['evaluation']['kl']:.3f}",
            *(f"{of_linears[key]:.3f}" for key in ("nominal", "entropy", "stored")),
            f"{result['bits']['model']['stored']:.2f}",
            f"{result['seconds']:.1f}",
            f"{result['peak_memory_bytes'] / 1e6:.0f}",
        )
    return table


if __name__ == "__main__":
    sys.exit(main())
