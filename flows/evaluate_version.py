"""Evaluate a registered version: download it, answer the benchmarks, and record the results beside it."""

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
from tasks.tracking.registry import download_version, place_of_version
from tasks.tracking.tags import tags_of

TABLE_KEY = "bivlm-evaluation"
Version = Annotated[str, Field(pattern=r"^[^/@:]{1,200}(/[0-9]{1,9}|@[A-Za-z0-9_-]{1,100})$")]


@flow(name="evaluate-version", flow_run_name="evaluate-{version}", persist_result=False)
def evaluate_version_flow(
    version: Version,
    benchmarks: list[Annotated[str, Field(min_length=1)]] | None = None,
    questions: Annotated[int, Field(ge=1)] | None = None,
    workspace: str | None = None,
) -> dict[str, Any]:
    """Evaluate a registered version on `benchmarks`, and add the results to its run and its logged model in MLflow.

    What this checkpoint has answered is not asked again. Returns ``{"version", "page", "evaluation"}``, the figures
    by benchmark. Raises `InputError` for a version or a benchmark that does not exist.

    Args:
        version: NAME/VERSION or NAME@ALIAS, such as NAME@champion.
        benchmarks: as in a recipe's evaluation; by default those of the recipe that made the version.
        questions: only the first of every benchmark.
        workspace: a folder or s3://bucket/prefix; by default that of the worker.
    """
    store = Workspace.open(workspace or default_workspace())
    found, tracked = place_of_version(version, store)
    name, page = f"{found.name}/{found.version}", tracking.run_page(tracked)
    publish_page(page)
    device = choose_device()
    with in_use(store), store.scratch() as folder:
        place = str(download_version(name, store, Path(folder)))
        lineage = read_lineage(place)
        sha256 = lineage.packed.sha256
        if (found_sha256 := Checkpoint.open(place).digest()) != sha256:
            raise InputError(
                f"model version {version}: its files have the sha256 {found_sha256}, not that of lineage.json"
            )
        asked = list(dict.fromkeys(benchmarks or lineage.recipe.get("evaluation") or ()))
        if not asked:
            raise InputError(f"benchmarks: found none, and the recipe of {version} names none; expected at least one")
        for benchmark in asked:
            evaluation.open_benchmark(benchmark, questions)  # a mistake in the last one is found before the first runs
        pruning = carried_pruning(place)
        try:
            done = {
                benchmark: evaluation.evaluate_checkpoint(
                    place, sha256, benchmark, questions, device, store.url, pruning
                )
                for benchmark in asked
            }
        finally:
            evaluation.forget_models()
        model_id = tags_of(found).model_id or found.model_id
        for each in done.values():
            tracking.log_evaluation(tracked, "packed", sha256, each, model_id, store.url)
    figures = {
        benchmark: {key: each.record.figures[key] for key in ("n", "metrics", "ci95")} | {"reused": each.reused}
        for benchmark, each in done.items()
    }
    rows = [
        {"benchmark": benchmark, "questions": each["n"]}
        | {key: f"{value:.2f}" for key, value in each["metrics"].items()}
        for benchmark, each in figures.items()
    ]
    create_table_artifact(rows, key=TABLE_KEY, description=name)
    return {"version": name, "page": page, "evaluation": figures}
