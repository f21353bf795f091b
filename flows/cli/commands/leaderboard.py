"""`bivlm leaderboard`: compare many recipes on one model."""

from __future__ import annotations

import argparse
from typing import Any

from flows.cli.commands import DONE, announce_start
from flows.cli.quiet import hide_loading_bars


def add(commands: Any) -> list[argparse.ArgumentParser]:
    """Add the parsers to the `commands` of another, and return them."""
    leaderboard = commands.add_parser("leaderboard", help="many recipes on one model, at the bits they store")
    leaderboard.add_argument("--model", required=True, metavar="DIR_OR_HUB_ID", help="the full-precision checkpoint")
    leaderboard.add_argument("--revision", metavar="R", help="branch, tag or commit on the hub; sha256 of a folder")
    leaderboard.add_argument(
        "--recipes", nargs="+", default=["all"], metavar="R", help="shipped names, YAML files; 'all' the shipped ones"
    )
    leaderboard.add_argument("--output", required=True, metavar="DIR", help="folder for checkpoints, table and figure")
    leaderboard.add_argument("--workspace", metavar="DIR_OR_URL", help="as for compress")
    leaderboard.add_argument("--questions", type=int, metavar="N", help="only the first N of every benchmark")
    leaderboard.add_argument("--finish", action="store_true", help="tune scales and levels of every packed model by KL")
    leaderboard.set_defaults(run=_leaderboard)
    return [leaderboard]


def _leaderboard(options: argparse.Namespace) -> int:
    from bivlm.recipe.loading import load_recipe, shipped_recipes

    recipes = [name for given in options.recipes for name in (shipped_recipes() if given == "all" else [given])]
    for name in recipes:
        load_recipe(name)
    announce_start("Prefect, MLflow and the model's anatomy")
    from flows.cli.console import print_board
    from flows.cli.local_server import temporary_server
    from flows.leaderboard import leaderboard_flow

    hide_loading_bars()
    with temporary_server():
        result = leaderboard_flow(
            model=options.model,
            recipes=recipes,
            output=options.output,
            revision=options.revision,
            workspace=options.workspace,
            questions=options.questions,
            finish=options.finish,
        )
    print_board(result["board"])
    print(f"board: {result['output']} (board.json, board.md, board.csv, board.svg)")
    print(f"fingerprint: {result['fingerprint']}")
    return DONE
