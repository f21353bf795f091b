"""`bivlm ask`: one question about an image, to a checkpoint or to two, with speed and memory."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flows.cli.commands import DONE, print_json
from flows.cli.quiet import hide_loading_bars


def add(commands: Any) -> list[argparse.ArgumentParser]:
    """Add the parser to the `commands` of another, and return it."""
    ask = commands.add_parser(
        "ask",
        help="one question about an image: the answer, tokens a second and memory",
        epilog="example: bivlm ask OUT photo.jpg 'What is on the table?' --against BASE",
    )
    ask.add_argument("model", metavar="DIR_OR_HUB_ID")
    ask.add_argument("image", metavar="IMAGE", type=Path)
    ask.add_argument("question", metavar="QUESTION")
    ask.add_argument("--against", metavar="DIR_OR_HUB_ID", help="another checkpoint, asked the same")
    ask.add_argument(
        "--dequantize",
        choices=("load", "forward", "packed"),
        help="packed weights: rebuilt once, at each use, or multiplied as they are; packed on a CPU, load on a GPU",
    )
    ask.add_argument(
        "--activations",
        choices=("float32", "int8"),
        default="float32",
        help="of packed weights; int8: faster, less exact (float32)",
    )
    ask.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="of the answer at most (64)")
    ask.add_argument("--json", action="store_true", help="print one JSON object")
    ask.set_defaults(run=_ask)
    return [ask]


def _ask(options: argparse.Namespace) -> int:
    from bivlm.evaluation.asking import ask
    from bivlm.sources.models import resolve_model

    hide_loading_bars()
    folders = {name: resolve_model(name).folder for name in (options.model, options.against) if name is not None}
    how = {
        "dequantize": options.dequantize,
        "activations": options.activations,
        "max_new_tokens": options.max_new_tokens,
    }
    found = {name: ask(folder, options.image, options.question, **how) for name, folder in folders.items()}
    if options.json:
        rates = {name: {"tokens_a_second": asked.tokens_a_second} for name, asked in found.items()}
        print_json({name: asdict(asked) | rates[name] for name, asked in found.items()})
    else:
        from flows.cli.console import print_asked

        print_asked(found)
    return DONE
