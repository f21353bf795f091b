"""The board as a table: cells for any table of text, Markdown, CSV."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from bivlm.reports.leaderboard.entries import LOSSES, Loss
from bivlm.reports.leaderboard.ranking import fronts_of, not_above_chance, ranks_of
from bivlm.reports.markdown_table import markdown_table

_EXPLANATION = (
    "Bits per weight of the packed linears as the method's paper counts them (claimed) and as bytes in the files "
    "(stored), and of the whole model's files (model). Accuracy in percent: the mean of the benchmarks ± its 95 % "
    "interval. KL to full precision in nats per token, on {measured_on}. Rank: by accuracy and by KL, among the "
    "recipes that store no more bits. Error is ‖W − Ŵ‖² / ‖W‖² of the packed linears. Front: no recipe of fewer "
    "stored bits does as well, and none of as many does better, in accuracy (A), KL (K) or error (E)."
)
SHANNON = "× Shannon"
_SHANNON = "× Shannon: the error over 2^(−2 × stored bits)."
_MARKS: dict[Loss, str] = {"accuracy": "A", "kl": "K", "relative_error": "E"}
_WHAT = ("number", "recipe", "method", "finish", "needs_calibration")
_NONE = "–"


def explanation(board: Mapping[str, Any]) -> str:
    """Say what the columns of `as_cells` mean, apart from `SHANNON`."""
    return _EXPLANATION.format(measured_on=board["measured_on"])


def as_cells(board: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return headings and rows of the board as text, for any table: full precision first, chance last.

    After ± stands the longer side of the mean's 95 % interval; "rank A/K" has the ranks of `ranks_of` by accuracy and
    KL; "front" has A, K and E for the Pareto fronts of accuracy, KL and error.
    """
    full, chance = board["full_precision"], board["chance"]
    tasks = list(board["questions"])
    headings = ["#", "recipe", "claimed", "stored", "model", "accuracy", *short_names(tasks)]
    headings += ["KL", "rank A/K", "error", SHANNON, "front"]
    plain, model = f"{full['bits']:.3f}", f"{full['model_bits']:.2f}"
    rows = [["", "full precision", plain, plain, model, *_accuracies(full, tasks), "0", "", "0", _NONE, ""]]
    for entry in board["entries"]:
        bits, front, ranks = entry["bits"], fronts_of(board, entry["recipe"]), ranks_of(board, entry["recipe"])
        row = [str(entry["number"]), entry["recipe"], f"{bits['nominal']:.3f}", f"{bits['stored']:.3f}"]
        row += [f"{entry['model_bits']:.2f}", *_accuracies(entry, tasks), f"{entry['kl']:.3f}"]
        row += [f"{ranks['accuracy']}/{ranks['kl']}", f"{entry['relative_error']:.4f}", f"{entry['times_shannon']:.2f}"]
        rows.append([*row, "".join(_MARKS[loss] for loss in front)])
    levels = [_percent(level) for level in (chance["mean"], *chance["accuracy"].values())]
    rows.append(["", "chance", *[_NONE] * 3, *levels, _NONE, "", *[_NONE] * 2, ""])
    return headings, rows


def as_markdown(board: Mapping[str, Any]) -> str:
    """Return the board as a table in Markdown, then what its columns mean, and the recipes that failed with reasons.

    Before it stand the benchmarks on which full precision is not above chance.
    """
    lines = [line for found in not_above_chance(board) for line in (f"Warning: {_one_line(str(found))}.", "")]
    lines += [*markdown_table(*as_cells(board), left=("recipe", "front")), "", f"{explanation(board)} {_SHANNON}"]
    if board["failed"]:
        lines += ["", "Not on the board:", ""]
        lines += [f"- {failure['recipe']}: {_one_line(failure['reason'])}" for failure in board["failed"]]
    return "\n".join(lines) + "\n"


def as_csv(board: Mapping[str, Any]) -> str:
    """Return the board as CSV: a row for full precision, each recipe, those that failed, and chance.

    `kind` tells them apart. Numbers have six significant digits; accuracies and their limits are in percent, KL in nats
    per token, 1 in `front_*` is a member, `rank_*` are of `ranks_of`.
    """
    tasks = list(board["questions"])
    rows: list[dict[str, Any]] = [{"kind": "full precision", **_values(board["full_precision"], tasks)}]
    rows[0] |= {"claimed_bits": rows[0]["stored_bits"], "kl": 0, "relative_error": 0}
    for entry in board["entries"]:
        front = {f"front_{loss}": int(entry["recipe"] in board["pareto"][loss]) for loss in LOSSES}
        ranks = {f"rank_{loss}": rank for loss, rank in ranks_of(board, entry["recipe"]).items()}
        seconds = board["seconds"][entry["recipe"]]
        rows.append({"kind": "recipe", **_values(entry, tasks), **front, **ranks, "seconds": seconds})
    rows += [{"kind": "failed", **failure} for failure in board["failed"]]
    rows.append({"kind": "chance", "accuracy": board["chance"]["mean"], **board["chance"]["accuracy"]})
    known = next((row for row in rows if row["kind"] == "recipe"), rows[0])
    columns = dict.fromkeys(["kind", *_WHAT, *known, "reason"])
    table = pd.DataFrame(rows, columns=list(columns)).convert_dtypes()
    return table.to_csv(index=False, float_format="%.6g", lineterminator="\n")


def short_names(tasks: Sequence[str]) -> list[str]:
    """Return the last part of each task's name, "choice" of "reference:choice"; whole names if two would be equal."""
    short = [task.rstrip("/").rpartition(":")[2].rpartition("/")[2] for task in tasks]
    return short if len(set(short)) == len(short) else list(tasks)


def _accuracies(record: Mapping[str, Any], tasks: Sequence[str]) -> list[str]:
    mean, (low, high) = record["mean_accuracy"]["accuracy"], record["mean_accuracy"]["ci95"]
    first = f"{mean:.1f} ± {max(mean - low, high - mean):.1f}"
    return [first, *(_percent(record["accuracy"][task]["accuracy"]) for task in tasks)]


def _percent(value: float | None) -> str:
    return _NONE if value is None else f"{value:.1f}"


def _values(record: Mapping[str, Any], tasks: Sequence[str]) -> dict[str, Any]:
    """Return the columns of `as_csv` that full precision and a recipe have."""
    values = {key: record[key] for key in _WHAT if key in record}
    bits = record["bits"] if isinstance(record["bits"], dict) else {"stored": record["bits"]}
    values |= {"claimed_bits" if key == "nominal" else f"{key}_bits": bits[key] for key in bits}
    values["model_bits"] = record["model_bits"]
    parts = {"accuracy": record["mean_accuracy"], **{task: record["accuracy"][task] for task in tasks}}
    for name, result in parts.items():
        values |= {name: result["accuracy"], f"{name}_low": result["ci95"][0], f"{name}_high": result["ci95"][1]}
    return values | {key: record[key] for key in ("kl", "relative_error", "times_shannon") if key in record}


def _one_line(text: str) -> str:
    return " ".join(text.split())
