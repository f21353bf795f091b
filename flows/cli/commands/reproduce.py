"""`bivlm reproduce`: reproduce the paper's tables for one of its models."""

from __future__ import annotations

import argparse
from typing import Any

from flows.cli.commands import DONE, announce_start
from flows.cli.quiet import hide_loading_bars


def add(commands: Any) -> list[argparse.ArgumentParser]:
    """Add the parsers to the `commands` of another, and return them."""
    reproduce = commands.add_parser("reproduce", help="the tables of arXiv 2509.18763 for one of its models")
    reproduce.add_argument(
        "--model", required=True, metavar="NAME", help="qwen2.5-vl-7b, llava-onevision-7b or llama-3.2-vision-11b"
    )
    reproduce.add_argument(
        "--checkpoint", metavar="DIR_OR_HUB_ID", help="where it is (default: the hub, as the paper names it)"
    )
    reproduce.add_argument("--revision", metavar="R", help="branch, tag or commit on the hub")
    reproduce.add_argument("--output", required=True, metavar="DIR", help="folder for checkpoints and tables")
    reproduce.add_argument("--tables", nargs="+", metavar="T", help="comparison, components (default: both)")
    reproduce.add_argument(
        "--tasks", nargs="+", metavar="TASK", help="the benchmarks or copies of them (default: all four from the hub)"
    )
    reproduce.add_argument("--calibration", metavar="SOURCE", help="of the 64 samples, as in a recipe")
    reproduce.add_argument("--questions", type=int, metavar="N", help="only the first N of every benchmark")
    reproduce.add_argument("--workspace", metavar="DIR_OR_URL", help="as for compress")
    reproduce.add_argument("--runner", metavar="R", help="as for compress")
    reproduce.add_argument("--workers", type=int, metavar="N", help="as for compress")
    reproduce.set_defaults(run=_reproduce)
    return [reproduce]


def _reproduce(options: argparse.Namespace) -> int:
    """Run the flow on a temporary server and print the tables."""
    from bivlm.reports.paper_tables.published import published

    published(options.model)  # a mistake fails before anything is started
    announce_start("Prefect, MLflow and the model's anatomy")
    from flows.cli.console import print_reproduction
    from flows.cli.local_server import temporary_server
    from flows.reproduction import reproduce_flow

    names = ("model", "checkpoint", "revision", "output", "tables", "tasks", "calibration", "questions")
    names += ("workspace", "runner", "workers")
    given = {name: value for name in names if (value := getattr(options, name)) is not None}
    hide_loading_bars()
    with temporary_server():
        found = reproduce_flow(**given)
    print_reproduction(found)
    return DONE
