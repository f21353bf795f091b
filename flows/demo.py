"""The demo: the reference model, compressed by the three shipped recipes, in one table.

``python -m flows.demo --output demo`` needs no server and no network.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
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
    # Nothing that is configured on this machine shall change what the demo does.
    for name in ("PREFECT_API_URL", "PREFECT_PROFILE", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        os.environ.pop(name, None)
    os.environ["PREFECT_HOME"] = str(output / "prefect")
    quieten()
    from bivlm.errors import InputError
    from bivlm.stores.folder import writable_folder

    results = {}
    try:
        writable_folder(output / "prefect", "folder of the demo")
        questions = 4 * options.questions
        print(f"{len(RECIPES)} compressions, each asked {questions:,} questions: about two minutes", file=sys.stderr)
        for number, recipe in enumerate(RECIPES, start=1):
            print(f"{number} of {len(RECIPES)}: {recipe}", file=sys.stderr)
            # A process of its own each, as `bivlm compress` is: none starts with the memory that another has left.
            with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as process:
                results[recipe] = process.submit(_compress, recipe, output, options.questions).result()
    except InputError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("demo: interrupted; run it again to go on from where it was", file=sys.stderr)
        return 1
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

    Console().print(_table(results))
    last = results[RECIPES[-1]]
    print("Accuracy in percent, of the model loaded from its stored bytes. KL to full precision in nats, mean over")
    print("the tokens of the calibration replies. Seconds and peak memory are of the compression, without evaluation.")
    for recipe, result in results.items():
        print(f"checkpoint of {recipe}: {result['output']}")
    print(f"report of {RECIPES[-1]}, the others for comparison: {last['page']}")
    print(f"MLflow: {last['mlflow']['ui']}")
    print(f"  then: {last['mlflow']['page']}")


def _table(results: dict[str, dict[str, Any]]) -> Any:
    """A column a model, so that it fits into a terminal of 80 characters."""
    from rich.table import Table

    from bivlm.bits import bits_of
    from bivlm.checkpoint import Checkpoint, linears
    from bivlm.evaluation.reference_sets import chance
    from bivlm.reference import CHECKPOINT

    most_bits_first = sorted(results.values(), key=lambda result: -result["bits"]["linears"]["stored"])
    names = {id(result): recipe for recipe, result in results.items()}
    first = most_bits_first[0]["evaluation"]
    questions = next(iter(first["packed"].values()))["n"]
    table = Table(title=f"the reference model, {questions} questions a set")
    table.add_column("")
    for name in ("full\nprecision", *(names[id(result)] for result in most_bits_first)):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("chance", justify="right")

    def row(label: str, before: str, value: Callable[[dict[str, Any]], str], guess: str = "") -> None:
        table.add_row(label, before, *map(value, most_bits_first), guess)

    for task, before in first["full_precision"].items():
        name = task.partition(":")[2]
        row(
            name,
            f"{before['metrics']['accuracy']:.1f}",
            lambda result, task=task: f"{result['evaluation']['packed'][task]['metrics']['accuracy']:.1f}",
            f"{chance(name):.0f}",
        )
    row("KL, nats", "0", lambda result: f"{result['evaluation']['kl']:.3f}")
    table.add_section()
    width = {8 * linear.dtype.itemsize for linear in linears(Checkpoint.open(CHECKPOINT))}
    plain = f"{max(width):.0f}" if len(width) == 1 else "-"
    for key, before in (("nominal", plain), ("entropy", "-"), ("stored", plain)):
        row(f"{key} bits", before, lambda result, key=key: f"{result['bits']['linears'][key]:.3f}")
    whole = f"{bits_of(CHECKPOINT)['model']['stored']:.2f}"
    row("stored, whole model", whole, lambda result: f"{result['bits']['model']['stored']:.2f}")
    table.add_section()
    row("seconds", "-", lambda result: f"{result['seconds']:.1f}")
    row("peak MB", "-", lambda result: f"{result['peak_memory_bytes'] / 1e6:.0f}")
    return table


if __name__ == "__main__":
    sys.exit(main())
