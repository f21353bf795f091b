"""`bivlm sweep` and `bivlm redundancy`: drop image tokens, and measure what that costs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flows.cli.commands import DONE, announce_start, print_json
from flows.cli.commands.looking import modules_from
from flows.cli.quiet import hide_loading_bars


def add(commands: Any) -> list[argparse.ArgumentParser]:
    """Add the parsers to the `commands` of another, and return them."""
    sweep = commands.add_parser("sweep", help="drop tokens by layer and share, and see what that costs")
    sweep.add_argument(
        "--model", required=True, nargs="+", metavar="DIR_OR_HUB_ID", help="checkpoints, packed or not, side by side"
    )
    sweep.add_argument("--revision", metavar="R", help="branch, tag or commit on the hub")
    sweep.add_argument("--task", required=True, nargs="+", metavar="TASK", help="reference:SET or vqa:FOLDER")
    sweep.add_argument("--output", required=True, metavar="DIR", help="folder for tables and figures")
    sweep.add_argument("--places", nargs="+", metavar="PLACE", help="vision, input, language, text, joint")
    sweep.add_argument(
        "--layers", nargs="+", metavar="J", help="first layers without the dropped tokens; or PLACE=J,J,... for some"
    )
    sweep.add_argument("--shares", nargs="+", type=_share, metavar="S", help="dropped, for example 0.5 or 50%%")
    sweep.add_argument(
        "--masses", nargs="+", type=_share, metavar="M", help="of attention kept, adaptively; at language"
    )
    sweep.add_argument("--scores", nargs="+", metavar="SCORE", help="attention, last_token, divprune, ...")
    sweep.add_argument("--questions", type=int, metavar="N", help="only the first N of every task")
    sweep.add_argument("--modules", metavar="FILE", type=Path, help="as for inspect")
    sweep.add_argument("--workspace", metavar="DIR_OR_URL", help="as for compress")
    sweep.set_defaults(run=_sweep)

    redundancy = commands.add_parser("redundancy", help="how many image tokens a model can do without")
    redundancy.add_argument("--model", required=True, metavar="DIR_OR_HUB_ID", help="a checkpoint, packed or not")
    redundancy.add_argument("--revision", metavar="R", help="branch, tag or commit on the hub")
    redundancy.add_argument("--task", required=True, nargs="+", metavar="TASK", help="reference:SET or vqa:FOLDER")
    redundancy.add_argument(
        "--tolerance", required=True, type=_share, metavar="T", help="accuracy that may be lost, for example 1%%"
    )
    redundancy.add_argument("--place", default="language", metavar="PLACE", help="as for sweep (default: %(default)s)")
    redundancy.add_argument("--layers", nargs="+", type=int, metavar="J", help="each on its own")
    redundancy.add_argument("--score", metavar="SCORE", help="as for sweep")
    redundancy.add_argument("--questions", type=int, metavar="N", help="only the first N of every task")
    redundancy.add_argument("--modules", metavar="FILE", type=Path, help="as for inspect")
    redundancy.add_argument("--workspace", metavar="DIR_OR_URL", help="as for compress")
    redundancy.add_argument("--json", action="store_true", help="print one JSON object")
    redundancy.set_defaults(run=_redundancy)
    return [sweep, redundancy]


def _sweep(options: argparse.Namespace) -> int:
    given = {key: getattr(options, key) for key in ("places", "layers", "shares", "scores", "masses", "questions")}
    modules = modules_from(None, options.modules)
    announce_start("Prefect and the models")
    from flows.cli.console import print_sweep
    from flows.cli.local_server import temporary_server
    from flows.pruning import parse_sweep, sweep_flow

    sweep = {key: value for key, value in given.items() if value is not None}
    if "layers" in sweep:
        sweep["layers"] = _layers(sweep["layers"])
    parse_sweep(sweep)
    hide_loading_bars()
    with temporary_server():
        result = sweep_flow(
            models=options.model,
            benchmarks=options.task,
            sweep=sweep,
            output=options.output,
            revision=options.revision,
            workspace=options.workspace,
            modules=modules,
        )
    print_sweep(result)
    print(f"sweep: {result['output']} (sweep.csv, tables/, losses.svg, accuracy.svg)")
    return DONE


def _redundancy(options: argparse.Namespace) -> int:
    layers = options.layers or ([None] if options.place == "input" else [1])
    score = {} if options.score is None else {"score": options.score}
    cells = [{"place": options.place, "layer": layer, **score} for layer in layers]
    modules = modules_from(None, options.modules)
    announce_start("Prefect and the model")
    from flows.cli.console import print_redundancy
    from flows.cli.local_server import temporary_server
    from flows.pruning import redundancy_flow

    hide_loading_bars()
    with temporary_server():
        results = redundancy_flow(
            model=options.model,
            benchmarks=options.task,
            tolerance=100 * options.tolerance,
            cells=cells,
            questions=options.questions,
            revision=options.revision,
            workspace=options.workspace,
            modules=modules,
        )
    if options.json:
        print_json({"model": options.model, "tolerance": 100 * options.tolerance, "found": results})
    else:
        print_redundancy(results)
    return DONE


def _layers(given: Sequence[str]) -> list[int] | dict[str, list[int]]:
    """Return layers for all places, ``1 2``, or by place, ``vision=1 language=1,2``."""
    from bivlm.errors import InputError

    try:
        if any("=" in text for text in given):
            by_place = (text.split("=", 1) for text in given)
            return {place: [int(layer) for layer in layers.split(",")] for place, layers in by_place}
        return [int(text) for text in given]
    except ValueError:
        raise InputError(f"--layers {' '.join(given)}: expected numbers, or PLACE=NUMBER,NUMBER,... by place") from None


def _share(text: str) -> float:
    """Return a share given as a number, or in percent with its sign."""
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = -1.0
    if not 0 <= share < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a share from 0 up to but not 1, such as 0.25 or 25%")
    return share
