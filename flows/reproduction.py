"""Reproduce the paper's tables: every column for one of its models, one compression after another."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prefect import flow

from bivlm.errors import InputError, describe
from bivlm.evaluation.chance import AtChance
from bivlm.reports.paper_tables.published import TABLES, published
from bivlm.reports.paper_tables.recipe_sets import FULL_PRECISION, recipe_set
from bivlm.reports.paper_tables.report import as_markdown, as_table, scores_of
from bivlm.reports.table_folders import check_tables, write_tables
from bivlm.untrusted import read_object
from bivlm.workspace.places import output_folder
from flows.leaderboard import attempt_each, check_outputs, measured_on

FILES = ("reproduction.json", "reproduction.md", *(f"{table}.csv" for table in TABLES))
TASKS = ("mme:hub", "scienceqa:hub", "mmmu:hub", "vizwiz:hub")


@flow(name="reproduce", flow_run_name="reproduce-{model}", persist_result=False)
def reproduce_flow(
    model: str,
    output: str,
    checkpoint: str | None = None,
    revision: str | None = None,
    tables: Sequence[str] = TABLES,
    tasks: Sequence[str] = TASKS,
    calibration: str = "reference",
    questions: int | None = None,
    workspace: str | None = None,
    runner: str = "threads",
    workers: int | None = None,
) -> dict[str, Any]:
    """Compress the paper's `model` by the recipe of every column of `tables` and evaluate it on `tasks`.

    `checkpoint` is where the model is, if not on the hub under the id that the paper means. Packed checkpoints go into
    folders of their columns' names in `output`; beside them ``reproduction.json``, ``reproduction.md``,
    ``comparison.csv`` and ``components.csv``. A killed run resumes. A column that cannot be carried out is listed with
    the reason. Returns what ``reproduction.json`` holds, ``output`` and ``tables``. Raises `InputError`.
    """
    paper = published(model)
    for table in tables:
        if table not in TABLES:
            raise InputError(f"tables: found {table!r}, expected some of {', '.join(TABLES)}")
    recipes = recipe_set(paper, tables, tasks, calibration)
    place = output_folder(output)
    check_outputs(place, "reproduction", recipes, checkpoint or paper.id, workspace)
    check_tables(place, FILES.__contains__, FILES[:2])
    asked = {"tasks": list(tasks), "questions": questions, "source": calibration, "measured_on": measured_on(recipes)}
    columns: dict[str, dict[str, Any]] = {}
    for attempt in attempt_each(
        checkpoint or paper.id,
        recipes,
        place,
        _in_short,
        revision=revision,
        workspace=workspace,
        questions=questions,
        runner=runner,
        workers=workers,
    ):
        if attempt.error is not None:
            columns[attempt.name] = {"failed": describe(attempt.error)}
        else:
            columns[attempt.name] = _packed(attempt.result)
            columns.setdefault(FULL_PRECISION, _full_precision(attempt.result))
        _write(place, paper.name, tables, columns, asked)
    found = read_object(place / "reproduction.json")
    return found | {"output": str(place), "tables": list(tables)}


def _in_short(result: Mapping[str, Any]) -> str:
    return f"{result['bits']['linears']['stored']:6.3f} stored bits  KL {result['evaluation']['kl']:.3f}"


def _packed(result: Mapping[str, Any]) -> dict[str, Any]:
    bits, evaluation = result["bits"], result["evaluation"]
    return {
        "scores": scores_of(evaluation["packed"]),
        "nominal_bits": bits["linears"]["nominal"],
        "stored_bits": bits["linears"]["stored"],
        "model_bits": bits["model"]["stored"],
        "kl": evaluation["kl"],
    }


def _full_precision(result: Mapping[str, Any]) -> dict[str, Any]:
    bits = result["full_precision_bits"]
    return {
        "scores": scores_of(result["evaluation"]["full_precision"]),
        "nominal_bits": bits["linears"],
        "stored_bits": bits["linears"],
        "model_bits": bits["model"],
        "kl": 0.0,
        "warnings": [str(AtChance(**found)) for found in result["evaluation"]["at_chance"]],
    }


def _write(
    place: Path, model: str, tables: Sequence[str], columns: Mapping[str, Any], asked: Mapping[str, Any]
) -> None:
    """Write the tables, after every column, so that a run of days can be looked at."""
    paper = published(model)
    texts = {
        "reproduction.json": json.dumps({"model": model, "id": paper.id, **asked, "columns": columns}, indent=2) + "\n",
        "reproduction.md": as_markdown(paper, tables, columns, asked["measured_on"]),
    }
    texts |= {f"{table}.csv": as_table(paper, table, columns).to_csv(index=False) for table in tables}
    write_tables(place, texts, FILES.__contains__)
