"""The demo: the reference model, compressed by the three shipped recipes, in one table.

``python -m flows.cli.demo --output demo`` needs no server and no network.
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

from flows.cli.quiet import hide_loading_bars, quieten
from flows.cli.terminal import run_command

RECIPES = ("bivlm-paper", "bivlm", "trellis-2bit")  # the last one's page shows all three
QUESTIONS = 250
_HEADINGS = {"perception": "per-\ncep-\ntion", "cognition": "cog-\nni-\ntion"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Compress, evaluate and print the table; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m flows.cli.demo", description=__doc__.partition("\n")[0])
    parser.add_argument("--output", default="demo", metavar="DIR", help="folder for all that the demo makes")
    parser.add_argument(
        "--questions", default=QUESTIONS, type=int, metavar="N", help="questions of every set (default: %(default)s)"
    )
    return run_command(lambda: _demo(parser.parse_args(arguments)))


def _demo(options: argparse.Namespace) -> int:
    from bivlm.errors import InputError
    from bivlm.workspace.places import output_folder

    try:
        output = output_folder(options.output)
    except InputError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    # Nothing that is configured on this machine shall change what the demo does.
    for name in ("PREFECT_API_URL", "PREFECT_PROFILE", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        os.environ.pop(name, None)
    os.environ["PREFECT_HOME"] = str(output / "prefect")
    quieten()
    from bivlm.workspace.stores.folder import writable_folder

    results = {}
    try:
        writable_folder(output / "prefect", "folder of the demo")
        questions = 4 * options.questions
        print(f"{len(RECIPES)} compressions, each asked {questions:,} questions: about four minutes", file=sys.stderr)
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
    from flows.cli.local_server import temporary_server
    from flows.compress import compress_flow

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
    from flows.cli.stacking import show

    show(_table(results))
    last = results[RECIPES[-1]]
    print("Accuracy in percent, of the model loaded from its stored bytes. KL to full precision on")
    print(f"{last['evaluation']['measured_on']}. Seconds and memory: the compression.")
    for warning in last["warnings"]:
        print(f"warning: {warning}")
    for recipe, result in results.items():
        print(f"checkpoint of {recipe}: {result['output']}")
    print(f"report of {RECIPES[-1]}, the others for comparison: {last['page']}")
    print(f"MLflow: {last['mlflow']['ui']}")
    print(f"  then: {last['mlflow']['page']}")


def _table(results: dict[str, dict[str, Any]]) -> Any:
    """Return a table of one row per model, narrow enough for a terminal of 80 characters."""
    from rich.table import Table

    from bivlm.checkpoint.linears import linears
    from bivlm.checkpoint.reading import Checkpoint
    from bivlm.reference import CHECKPOINT
    from bivlm.reports.bits import bits_of

    rows = sorted(results.items(), key=lambda item: -item[1]["bits"]["linears"]["stored"])
    before = rows[0][1]["evaluation"]["full_precision"]
    questions = next(iter(before.values()))["n"]
    title = f"the reference model, {questions} questions a set; bits per weight of the linears"
    table = Table(title=title, box=None, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    names = [task.partition(":")[2] for task in before]
    headings = [_HEADINGS.get(name, name) for name in names]
    headings += ["KL,\nnats", "nomi-\nnal", "en-\ntropy", "stored", "whole\nmodel", "sec", "peak\nMB"]
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)

    width = {8 * linear.dtype.itemsize for linear in linears(Checkpoint.open(CHECKPOINT))}
    plain = f"{max(width):.0f}" if len(width) == 1 else "-"
    whole = f"{bits_of(CHECKPOINT)['model']['stored']:.2f}"
    accuracies = [f"{figures['metrics']['accuracy']:.1f}" for figures in before.values()]
    table.add_row("full precision", *accuracies, "0", plain, "-", plain, whole, "-", "-")
    for recipe, result in rows:
        table.add_row(
            recipe,
            *(f"{result['evaluation']['packed'][task]['metrics']['accuracy']:.1f}" for task in before),
            f"{result['evaluation']['kl']:.3f}",
            *(f"{result['bits']['linears'][key]:.3f}" for key in ("nominal", "entropy", "stored")),
            f"{result['bits']['model']['stored']:.2f}",
            f"{result['seconds']:.1f}",
            f"{result['peak_memory_bytes'] / 1e6:.0f}",
        )
    levels = rows[0][1]["evaluation"]["chance"]
    table.add_row("chance", *(f"{levels[task]:.0f}" for task in before))
    return table


if __name__ == "__main__":
    sys.exit(main())
