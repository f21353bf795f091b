"""The paper's tables anew: every column of them for one of its models, one compression after another."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prefect import flow
from rich.console import Console

from bivlm.checkpoint.outputs import check_replaceable
from bivlm.errors import InputError, describe
from bivlm.evaluation.chance import AtChance
from bivlm.recipe.calibration import held_out_samples
from bivlm.reports.paper_tables.published import TABLES, published
from bivlm.reports.paper_tables.recipe_sets import FULL_PRECISION, recipe_set
from bivlm.reports.paper_tables.report import as_markdown, as_table, scores_of
from bivlm.reports.table_folders import check_tables, write_tables
from bivlm.untrusted import read_object
from bivlm.workspace.places import Place, check_places, output_folder, output_place
from flows.compress import compress_flow
from flows.leaderboard import is_the_recipes

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
    """The paper's `model` compressed by the recipe of every column of `tables` and evaluated on `tasks`.

    `checkpoint` is where the model is, if not on the hub under the id that the paper means. Packed checkpoints go into
    folders of their columns' names in `output`; beside them ``reproduction.json``, ``reproduction.md``,
    ``comparison.csv`` and ``components.csv``. Killed, it goes on where it was. A column that cannot be carried out is
    listed with the reason. Returns what ``reproduction.json`` holds, ``output`` and
    ``tables``. Raises `InputError`.
    """
    paper = published(model)
    for table in tables:
        if table not in TABLES:
            raise InputError(f"tables: found {table!r}, expected some of {', '.join(TABLES)}")
    recipes = recipe_set(paper, tables, tasks, calibration)
    place = output_folder(output)
    outputs = [place / column for column in recipes]
    written = [Place("reproduction", place, written=True), *map(output_place, outputs)]
    data = [name for each in recipes.values() for name in each.data()]
    check_places(written, [checkpoint or paper.id], workspace, data)
    check_tables(place, FILES.__contains__, FILES[:2])
    for each in outputs:
        check_replaceable(each)
    console = Console(stderr=True)
    measured_on = held_out_samples(next(iter(recipes.values())).canonical()["calibration"])
    console.print(f"KL in nats a token, on {measured_on}", highlight=False, markup=False, soft_wrap=True)
    asked = {"tasks": list(tasks), "questions": questions, "source": calibration, "measured_on": measured_on}
    columns: dict[str, dict[str, Any]] = {}
    for number, (column, recipe) in enumerate(recipes.items(), start=1):
        started = time.perf_counter()
        try:
            result = compress_flow(
                model=checkpoint or paper.id,
                recipe=recipe.canonical(),
                output=str(place / column),
                revision=revision,
                workspace=workspace,
                questions=questions,
                quiet=True,
                runner=runner,
                workers=workers,
            )
        except Exception as error:
            if not is_the_recipes(error):
                raise
            columns[column] = {"failed": describe(error)}
            said = f"failed: {describe(error)};"
        else:
            columns[column] = _packed(result)
            columns.setdefault(FULL_PRECISION, _full_precision(result))
            said = f"{result['bits']['linears']['stored']:6.3f} stored bits  KL {columns[column]['kl']:.3f}"
        line = f"{number:>3} of {len(recipes)}  {column:<28} {said}  {time.perf_counter() - started:4.0f} s"
        console.print(line, highlight=False, markup=False, soft_wrap=True)
        _write(place, paper.name, tables, columns, asked)
    found = read_object(place / "reproduction.json")
    return found | {"output": str(place), "tables": list(tables)}


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
    """After every column, so that a run of days can be looked at."""
    paper = published(model)
    texts = {
        "reproduction.json": json.dumps({"model": model, "id": paper.id, **asked, "columns": columns}, indent=2) + "\n",
        "reproduction.md": as_markdown(paper, tables, columns, asked["measured_on"]),
    }
    texts |= {f"{table}.csv": as_table(paper, table, columns).to_csv(index=False) for table in tables}
    write_tables(place, texts, FILES.__contains__)
