"""`bivlm compress`: compress, evaluate and record a model; or estimate what that needs."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from flows.cli.commands import BAD_INPUT, DONE, NOT_PASSED, announce_start
from flows.cli.quiet import hide_loading_bars


def add(commands: Any) -> list[argparse.ArgumentParser]:
    """Add the parsers to the `commands` of another, and return them."""
    compress = commands.add_parser("compress", help="compress a model, evaluate it and record everything in MLflow")
    compress.add_argument("--model", required=True, metavar="DIR_OR_HUB_ID", help="the full-precision checkpoint")
    compress.add_argument("--revision", metavar="R", help="branch, tag or commit on the hub; sha256 of a folder")
    compress.add_argument(
        "--recipe",
        metavar="R",
        help="name of a shipped recipe, or a YAML file (default: trellis-2bit; without --calibration "
        "trellis-2bit-weights, which sees the weights alone)",
    )
    compress.add_argument(
        "--calibration",
        metavar="SOURCE",
        help="samples like those that the model will see, in place of the recipe's: a folder, a .jsonl file, "
        "hf:OWNER/NAME, or reference",
    )
    compress.add_argument("--output", required=True, metavar="DIR", help="folder for the packed checkpoint")
    compress.add_argument(
        "--workspace",
        metavar="DIR_OR_URL",
        help="folder or s3://bucket/prefix for finished steps (default: $BIVLM_WORKSPACE or ~/.cache/bivlm/workspace)",
    )
    compress.add_argument("--no-evaluate", action="store_true", help="leave accuracy and divergence out")
    compress.add_argument("--questions", type=int, metavar="N", help="only the first N of every benchmark")
    compress.add_argument(
        "--runner",
        default="threads",
        metavar="R",
        help="threads (default), processes, dask, ray, or a running cluster: dask=tcp://HOST:8786, ray=ray://HOST:10001",
    )
    compress.add_argument("--workers", type=int, metavar="N", help="layers at once (default: cores, at most 4)")
    compress.add_argument("--estimate", action="store_true", help="say what it needs of memory, disk and time; no work")
    compress.add_argument("--no-check", action="store_true", help="try what is said not to fit")
    compress.set_defaults(run=_compress)
    return [compress]


def _compress(options: argparse.Namespace) -> int:
    from bivlm.recipe.loading import default_recipe, load_recipe
    from flows.runners import parse_runner

    name = options.recipe or default_recipe(options.calibration)
    recipe = load_recipe(name)  # a mistake fails before anything is started
    if options.calibration:
        recipe = recipe.calibrated_on(options.calibration)
    if options.recipe is None:
        samples = f"samples of {options.calibration}" if options.calibration else "the weights alone"
        print(f"recipe: {name}, which looks at {samples}", file=sys.stderr)
    parse_runner(options.runner, options.workers)
    asked = {
        "model": options.model,
        "recipe": recipe.canonical() if options.calibration else name,
        "output": options.output,
        "revision": options.revision,
        "workspace": options.workspace,
        "evaluate": not options.no_evaluate,
        "questions": options.questions,
        "runner": options.runner,
        "workers": options.workers,
    }
    if options.estimate:
        from flows.cli.console import print_estimate
        from flows.estimates import estimate_compression

        found = estimate_compression(**asked)
        print_estimate(found)
        return BAD_INPUT if found["refused"] else DONE
    announce_start("Prefect, MLflow and the model's anatomy")
    from bivlm.errors import GateNotPassed
    from flows.cli.console import print_compression
    from flows.cli.local_server import temporary_server
    from flows.compress import compress_flow

    hide_loading_bars()
    refused = None
    with temporary_server():
        try:
            result = compress_flow(**asked, check=not options.no_check)
        except GateNotPassed as error:
            result, refused = error.result, error
    print_compression(result)
    if refused is not None:
        print(f"bivlm compress: {refused}", file=sys.stderr)
        return NOT_PASSED
    return DONE
