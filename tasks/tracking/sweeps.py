"""A pruning sweep in MLflow: a run for every cell, below that of the compression or below one of the sweep's own."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, Run
from prefect import task

from bivlm.workspace.hashing import digest
from tasks.runtime.naming import slug
from tasks.runtime.policy import OVER_NETWORK
from tasks.runtime.steps import open_workspace
from tasks.tracking.run import Tracking, find_run, open_experiment
from tasks.tracking.tags import Tag, having

FOLDER = "pruning"  # of its files among a run's artifacts
_CELL = ("model", "place", "score", "layer", "share")
_FIGURES = ("accuracy", "loss", "loss_low", "loss_high")


@task(name="log-sweep", **OVER_NETWORK)
def log_sweep(
    rows: Sequence[Mapping[str, Any]],
    folder: str,
    names: Sequence[str],
    workspace: str,
    parent: Tracking | None = None,
    warnings: Sequence[str] = (),
) -> str:
    """Log a child run for each cell with its accuracies and losses; return the id of the parent run.

    The artifacts are the files `names` in `folder`, and nothing else that lies there. Without a `parent` there is one
    for the sweep, whose description has the `warnings`. What is there already is not logged again.
    """
    client, experiment = open_experiment(open_workspace(workspace))
    run_id = parent.run_id if parent is not None else _own_run(client, experiment, rows, warnings)
    runs = client.search_runs([experiment], having({Tag.PARENT: run_id, Tag.ROLE: "pruned"}), max_results=50_000)
    known = {run.data.tags.get(Tag.CELL): run for run in runs}
    for values, of_cell in groupby(rows, key=lambda row: tuple(row[key] for key in _CELL)):
        cell = dict(zip(_CELL, values, strict=True))
        _log_cell(client, experiment, run_id, cell, list(of_cell), known)
    for name in names:
        below = PurePosixPath(FOLDER, name).parent
        client.log_artifact(run_id, str(Path(folder) / name), below.as_posix())
    if parent is None:
        client.set_terminated(run_id)
    return run_id


def _own_run(client: MlflowClient, experiment: str, rows: Sequence[Mapping[str, Any]], warnings: Sequence[str]) -> str:
    same = digest([dict(row) for row in rows])
    found = find_run(client, experiment, {Tag.SWEEP: same})
    if found is not None:
        return found.info.run_id
    models = ", ".join(dict.fromkeys(row["model"] for row in rows))
    note = f"Tokens dropped from the prompts of {models}; child runs hold the cells, `{FOLDER}/` the tables."
    note = " ".join([note, *(f"Warning: {said}." for said in warnings)])
    tags = {Tag.ROLE: "pruning sweep", Tag.SWEEP: same, Tag.NOTE: note, Tag.SOURCE: "bivlm sweep"}
    return client.create_run(experiment, run_name=f"pruning sweep · {models}"[:250], tags=tags).info.run_id


def _log_cell(
    client: MlflowClient,
    experiment: str,
    parent: str,
    cell: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    known: Mapping[str | None, Run],
) -> None:
    """Log a run with the figures of a cell's benchmarks, unless one is `known`; resume one that was cut off."""
    subject = digest({"cell": dict(cell), "rows": [dict(row) for row in rows]})
    run = known.get(subject)
    if run is not None and run.info.status == "FINISHED":
        return
    where = "before the first layer" if cell["layer"] is None else f"from layer {cell['layer']}"
    name = f"{cell['model']} · {cell['place']} {where} · {100 * cell['share']:g} % · {cell['score']}"
    if run is None:
        tags = {Tag.ROLE: "pruned", Tag.CELL: subject, Tag.PARENT: parent}
        run = client.create_run(experiment, run_name=name, tags=tags | {Tag.SOURCE: "bivlm sweep"})
    now = run.info.start_time
    metrics = [
        Metric(slug(f"{row['task']}/{key}", "/"), float(row[key]), now, 0)
        for row in rows
        for key in _FIGURES
        if row.get(key) is not None and math.isfinite(row[key])
    ]
    refused = next((row["refused"] for row in rows if row.get("refused")), None)
    params = [Param(key, str(value)) for key, value in cell.items() if value is not None]
    params.append(Param("checkpoint", rows[0]["checkpoint"]))
    params += [Param("refused", refused[:500])] if refused else []
    client.log_batch(run.info.run_id, metrics=metrics, params=params)
    client.set_terminated(run.info.run_id)
