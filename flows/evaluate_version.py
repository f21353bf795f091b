"""The evaluation of a registered version: downloaded from the registry, asked, and written down beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from prefect import flow
from prefect.artifacts import create_table_artifact
from pydantic import Field

from bivlm.checkpoint.reading import Checkpoint
from bivlm.errors import InputError
from bivlm.pruning.dropping import carried_pruning
from bivlm.reports.lineage import read_lineage
from bivlm.workspace.garbage import in_use
from bivlm.workspace.steps import Workspace
from bivlm.workspace.stores.location import default_workspace
from flows.progress import publish_page
from tasks import evaluation, tracking
from tasks.runtime.device import choose_device
from tasks.tracking.finished import logged_model_of, place_of_version
from tasks.tracking.lookup import download_version

TABLE_KEY = "bivlm-evaluation"
Version = Annotated[str, Field(pattern=r"^[^/@:]{1,200}(/[0-9]{1,9}|@[A-Za-z0-9_-]{1,100})$")]


@flow(name="evaluate-version", flow_run_name="evaluate-{version}", persist_result=False)
def evaluate_version_flow(
    version: Version,
    benchmarks: list[Annotated[str, Field(min_length=1)]] | None = None,
    questions: Annotated[int, Field(ge=1)] | None = None,
    workspace: str | None = None,
) -> dict[str, Any]:
    """Ask a registered version `benchmarks`, and add the results to its run and its logged model in MLflow.

    What was asked before, of the same checkpoint, is not asked again. Returns ``{"version", "page", "evaluation"}``,
    the figures by benchmark. Raises `InputError` for a version that is not there, or a benchmark.

    Args:
        version: NAME/VERSION or NAME@ALIAS, such as NAME@champion.
        benchmarks: as a recipe's evaluation; without it those of the recipe that made the version.
        questions: only the first of every benchmark.
        workspace: a folder or s3://bucket/prefix; without it that of the worker.
    """
    store = Workspace.open(workspace or default_workspace())
    found, tracked = place_of_version(version, store)
    publish_page(tracking.run_page(tracked))
    device = choose_device()
    with in_use(store), store.scratch() as folder:
        place = str(download_version(f"{found.name}/{found.version}", store, Path(folder)))
        lineage = read_lineage(place)
        if (sha256 := Checkpoint.open(place).digest()) != lineage.packed.sha256:
            raise InputError(f"model version {version}: its files have the sha256 {sha256}, not that of lineage.json")
        asked = list(dict.fromkeys(benchmarks or lineage.recipe.get("evaluation") or ()))
        if not asked:
            raise InputError(f"benchmarks: found none, and the recipe of {version} names none; expected at least one")
        for name in asked:
            evaluation.open_benchmark(name, questions)  # a mistake in the last one is told before the first is asked
        pruning = carried_pruning(place)
        try:
            done = {
                name: evaluation.evaluate_checkpoint(
                    place, lineage.packed.sha256, name, questions, device, store.url, pruning
                )
                for name in asked
            }
        finally:
            evaluation.forget_models()
        for each in done.values():
            tracking.log_evaluation(tracked, "packed", lineage.packed.sha256, each, logged_model_of(found), store.url)
    figures = {
        name: {key: each.record.figures[key] for key in ("n", "metrics", "ci95")} | {"reused": each.reused}
        for name, each in done.items()
    }
    rows = [
        {"benchmark": name, "questions": each["n"], **{key: f"{value:.2f}" for key, value in each["metrics"].items()}}
        for name, each in figures.items()
    ]
    create_table_artifact(rows, key=TABLE_KEY, description=f"{found.name}/{found.version}")
    return {"version": f"{found.name}/{found.version}", "page": tracking.run_page(tracked), "evaluation": figures}
