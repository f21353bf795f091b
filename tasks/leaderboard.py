"""The leaderboard: an entry for each recipe, tables and a figure in a folder, and a run in MLflow."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlflow.entities import Metric
from prefect import task

from bivlm.errors import InputError, describe
from bivlm.recipe.loading import Recipe
from bivlm.reports.figures.leaderboard import quality_against_bits
from bivlm.reports.figures.style import svg
from bivlm.reports.leaderboard.entries import Accuracy, Entry, FailedEntry, FullPrecision, method_label
from bivlm.reports.leaderboard.ranking import fingerprint
from bivlm.reports.leaderboard.tables import as_csv, as_markdown
from bivlm.reports.table_folders import write_tables
from tasks.runtime.policy import OVER_NETWORK
from tasks.runtime.steps import open_workspace
from tasks.tracking.run import open_experiment
from tasks.tracking.tags import Tag

BOARD, MARKDOWN, CSV, FIGURE = "board.json", "board.md", "board.csv", "board.svg"
BOARD_FILES = (BOARD, MARKDOWN, CSV, FIGURE)


def entry_of(recipe: Recipe, result: Mapping[str, Any]) -> Entry | FailedEntry:
    """Return a recipe's entry, from what `flows.compress.compress_flow` returned.

    A result that cannot be ranked (an infinite divergence) is an entry that failed.
    """
    known = _known(recipe)
    try:
        return Entry.read(
            {
                **known,
                "needs_calibration": result["calibrated"],
                "bits": {key: result["bits"]["linears"][key] for key in ("nominal", "entropy", "stored")},
                "model_bits": result["bits"]["model"]["stored"],
                "relative_error": result["relative_error"],
                "kl": result["evaluation"]["kl"],
                "accuracy": _accuracies(result["evaluation"]["packed"]),
                "seconds": result["seconds"],
            }
        )
    except InputError as error:
        return FailedEntry(**known, failed=str(error))


def failed_entry(recipe: Recipe, reason: BaseException) -> FailedEntry:
    """Return the entry of a recipe that could not be carried out."""
    return FailedEntry(**_known(recipe), failed=describe(reason))


def full_precision_of(result: Mapping[str, Any]) -> FullPrecision:
    """Return the entry of the model itself, from the result of any recipe."""
    return FullPrecision(
        bits=result["full_precision_bits"]["linears"],
        model_bits=result["full_precision_bits"]["model"],
        accuracy=_accuracies(result["evaluation"]["full_precision"]),
    )


def check_same_linears(results: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise `InputError` unless all recipes packed the same number of weights: bits have one denominator."""
    weights = {name: result["bits"]["linears"]["weights"] for name, result in results.items()}
    if len(set(weights.values())) > 1:
        shown = ", ".join(f"{name} {count:,}" for name, count in weights.items())
        raise InputError(f"the recipes pack different linears, so that their bits cannot be compared: {shown} weights")


def write_board(board: Mapping[str, Any], output: str) -> None:
    """Write the board into the folder `output`: a record, two tables and the figure."""
    texts = {
        BOARD: json.dumps(board, indent=1, ensure_ascii=False, allow_nan=False) + "\n",
        MARKDOWN: as_markdown(board),
        CSV: as_csv(board),
        FIGURE: svg(quality_against_bits(board)),
    }
    write_tables(Path(output), texts, BOARD_FILES.__contains__)


@task(name="log-board", **OVER_NETWORK)
def log_board(board: dict[str, Any], output: str, workspace: str) -> str:
    """Log the board's files and every recipe's figures as an MLflow run; returns its id.

    The same board twice is one run.
    """
    client, experiment = open_experiment(open_workspace(workspace))
    same = fingerprint(board)
    found = client.search_runs([experiment], f"tags.`{Tag.BOARD}` = '{same}'", max_results=1)
    if found:
        return found[0].info.run_id
    name = f"leaderboard · {board['model']['name']} · {len(board['entries'])} recipes"
    tags = {Tag.ROLE: "leaderboard", Tag.NOTE: as_markdown(board)[:5000], Tag.SOURCE: "bivlm leaderboard"}
    run = client.create_run(experiment, run_name=name, tags=tags)
    for file in BOARD_FILES:
        client.log_artifact(run.info.run_id, str(Path(output) / file))
    metrics = [
        Metric(f"{entry['recipe']}/{key}", value, run.info.start_time, 0)
        for entry in board["entries"]
        for key, value in {
            "stored_bits": entry["bits"]["stored"],
            "accuracy": entry["mean_accuracy"]["accuracy"],
            "kl": entry["kl"],
            "relative_error": entry["relative_error"],
        }.items()
    ]
    for begin in range(0, len(metrics), 1000):
        client.log_batch(run.info.run_id, metrics=metrics[begin : begin + 1000])
    client.set_terminated(run.info.run_id)
    client.set_tag(run.info.run_id, Tag.BOARD, same)  # last: it says that all of the above is there
    return run.info.run_id


def _known(recipe: Recipe) -> dict[str, Any]:
    canonical = recipe.canonical()
    return {
        "recipe": recipe.name,
        "method": method_label(canonical["components"]),
        "finish": canonical.get("finish") is not None,
    }


def _accuracies(evaluations: Mapping[str, Any]) -> dict[str, Accuracy]:
    return {
        task: Accuracy(n=found["n"], accuracy=found["metrics"]["accuracy"], ci95=tuple(found["ci95"]))
        for task, found in evaluations.items()
    }
