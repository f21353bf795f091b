"""The board: every recipe by its stored bits, its ranks, and which of them no other recipe dominates."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from bivlm.errors import InputError
from bivlm.evaluation.chance import AtChance, at_chance
from bivlm.reports.leaderboard.entries import LOSSES, Entry, FailedEntry, FullPrecision, Loss, mean_accuracy
from bivlm.workspace.hashing import digest

FORMAT = 1


def pareto_front(
    entries: Iterable[Entry], loss: Loss, full_precision: tuple[float, float] | None = None
) -> list[Entry]:
    """Return the entries that no other dominates, by rising stored bits.

    One dominates another if it has no more stored bits and no more loss, and less of one of them; two that are equal
    in both stand together. `full_precision`, its (bits, loss), ends the front without being a member: what
    it dominates is left out.
    """
    front: list[Entry] = []
    found = [(entry.bits.stored, entry.loss(loss), entry.recipe, entry) for entry in entries]
    end_bits, end_loss = full_precision or (math.inf, math.inf)
    lowest, at = math.inf, math.inf
    for bits, lost, _, entry in sorted(found, key=lambda each: each[:3]):
        if end_bits <= bits and end_loss <= lost and (end_bits, end_loss) != (bits, lost):
            continue
        if lost < lowest or (lost == lowest and bits == at):
            front.append(entry)
            lowest, at = lost, bits
    return front


def board(
    entries: Sequence[Entry | FailedEntry],
    full_precision: FullPrecision,
    *,
    model: Mapping[str, Any],
    chance: Mapping[str, float | None] | None = None,
    measured_on: str = "held-out samples",
) -> dict[str, Any]:
    """Return the board as a record ready for JSON, the same whatever the order of `entries`::

        {"format": 1, "model": model, "questions": {task: n}, "measured_on": measured_on,
         "full_precision": {"bits", "model_bits", "accuracy": {task: {"n", "accuracy", "ci95"}}, "mean_accuracy"},
         "chance": {"accuracy": {task: percent or None}, "mean": percent or None},
         "entries": [{"number", "recipe", "method", "finish", "needs_calibration", "bits", "model_bits",
                      "relative_error", "kl", "accuracy", "mean_accuracy": {"accuracy", "ci95"}, "times_shannon"}],
         "failed": [{"recipe", "method", "finish", "needs_calibration", "reason"}],
         "pareto": {loss: [recipe]}, "seconds": {recipe: seconds}}

    Entries stand by rising stored bits, numbered from 1, those that failed by name. `seconds` is the only part that
    changes when the same work is done again: `fingerprint` leaves it out. `model` says which one it is, as
    ``{"id", "revision", "sha256"}``, and a ``"name"`` for people; `chance` is in percent by task; `measured_on` names
    the samples of the KL.

    Raises `InputError` if there is no entry, two have one recipe name, or one answered other questions than full
    precision.
    """
    _check(entries, full_precision)
    tasks = list(full_precision.accuracy)
    measured = sorted((each for each in entries if isinstance(each, Entry)), key=lambda e: (e.bits.stored, e.recipe))
    failed = sorted((each for each in entries if isinstance(each, FailedEntry)), key=lambda each: each.recipe)
    levels = {task: (chance or {}).get(task) for task in tasks}
    known = [level for level in levels.values() if level is not None]
    mean = mean_accuracy(full_precision.accuracy.values())
    ends = {"accuracy": 100 - mean["accuracy"], "kl": 0.0, "relative_error": 0.0}
    return {
        "format": FORMAT,
        "model": dict(model),
        "questions": {task: result.n for task, result in full_precision.accuracy.items()},
        "measured_on": measured_on,
        "full_precision": full_precision.model_dump(mode="json") | {"mean_accuracy": mean},
        "chance": {"accuracy": levels, "mean": fmean(known) if len(known) == len(levels) else None},
        "entries": [{"number": number, **_row(entry, tasks)} for number, entry in enumerate(measured, start=1)],
        "failed": [{**_what(entry), "reason": entry.failed} for entry in failed],
        "pareto": {
            loss: [entry.recipe for entry in pareto_front(measured, loss, (full_precision.bits, ends[loss]))]
            for loss in LOSSES
        },
        "seconds": {entry.recipe: entry.seconds for entry in measured},
    }


def fingerprint(board: Mapping[str, Any]) -> str:
    """Return the SHA-256 of everything on the board but the seconds: equal if the same work gave the same results.

    Of the model only its own SHA-256 counts, not its place.
    """
    kept = {key: value for key, value in board.items() if key != "seconds"}
    return digest(kept | {"model": board["model"].get("sha256")})


def fronts_of(board: Mapping[str, Any], recipe: str) -> list[Loss]:
    """Return the losses on whose Pareto front the recipe is."""
    return [loss for loss in LOSSES if recipe in board["pareto"][loss]]


def ranks_of(board: Mapping[str, Any], recipe: str) -> dict[Loss, int]:
    """Return the recipe's rank by each loss among those that store no more bits: 1 if none of them loses less."""
    losses = {
        each["recipe"]: {"accuracy": 100 - each["mean_accuracy"]["accuracy"], **{k: each[k] for k in LOSSES[1:]}}
        for each in board["entries"]
    }
    bits = {each["recipe"]: each["bits"]["stored"] for each in board["entries"]}
    rivals = [losses[other] for other in losses if bits[other] <= bits[recipe]]
    return {loss: 1 + sum(rival[loss] < losses[recipe][loss] for rival in rivals) for loss in LOSSES}


def not_above_chance(board: Mapping[str, Any]) -> list[AtChance]:
    """Return the benchmarks on which full precision is not above chance."""
    found = board["full_precision"]["accuracy"]
    figures = {task: {**each, "metrics": {"accuracy": each["accuracy"]}} for task, each in found.items()}
    return at_chance(figures, board["chance"]["accuracy"])


def _check(entries: Sequence[Entry | FailedEntry], full_precision: FullPrecision) -> None:
    if not entries:
        raise InputError("the board has no entries: expected at least one recipe")
    names = [entry.recipe for entry in entries]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise InputError(f"recipe {twice!r} is on the board {names.count(twice)} times: names must differ")
    expected = {task: result.n for task, result in full_precision.accuracy.items()}
    for entry in entries:
        if isinstance(entry, Entry) and (asked := {task: x.n for task, x in entry.accuracy.items()}) != expected:
            raise InputError(
                f"recipe {entry.recipe!r} was asked {_questions(asked)}, full precision {_questions(expected)}: "
                "everything on a board must be asked the same questions"
            )


def _questions(asked: Mapping[str, int]) -> str:
    return ", ".join(f"{n} of {task}" for task, n in asked.items())


def _what(entry: FailedEntry) -> dict[str, Any]:
    return {key: getattr(entry, key) for key in ("recipe", "method", "finish", "needs_calibration")}


def _row(entry: Entry, tasks: Sequence[str]) -> dict[str, Any]:
    record = entry.model_dump(mode="json", exclude={"seconds"})
    accuracy = {task: record["accuracy"][task] for task in tasks}
    return record | {"accuracy": accuracy, "mean_accuracy": entry.mean, "times_shannon": entry.times_shannon}
