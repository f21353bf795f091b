"""What people read of a run: the page, the lineage record, the figures; and the runs to compare it with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlflow.entities import RunTag
from prefect import task

from bivlm.checkpoint.outputs import PAGE
from bivlm.checkpoint.reading import LINEAGE, REPORT
from bivlm.reports import figures
from bivlm.reports.lineage import read_lineage
from bivlm.workspace.hashing import digest, file_digest
from tasks.runtime.naming import slug
from tasks.runtime.policy import OVER_NETWORK
from tasks.runtime.steps import StepResult
from tasks.tracking.run import BASE_TAG, NOTE_TAG, ROLE_TAG, Tracking

BENCHMARKS_TAG = "bivlm.benchmarks"
SAMPLES_TAG = "bivlm.calibration.sha256"  # of a run and a version; those that the KL is measured on are among them
DOCUMENTS_TAG = "bivlm.documents"
RUNS_READ = 1000


def benchmarks_digest(evaluations: dict[str, StepResult]) -> str:
    """Equal for two runs that asked the same questions."""
    return digest({task: done.record.figures["benchmark_sha256"] for task, done in evaluations.items()})


@task(name="other-compressions", **OVER_NETWORK)
def other_points(
    tracking: Tracking, base_sha256: str, evaluations: dict[str, StepResult], samples: StepResult
) -> list[dict[str, Any]]:
    """Stored bits, accuracy and KL of other finished compressions of this base model that answered the same questions.

    The latest of every recipe, as `bivlm.reports.figures.compression.accuracy_against_bits` draws them. A KL that was
    measured on other samples than `samples` is left out.
    """
    if not evaluations:
        return []
    tags = {BASE_TAG: base_sha256, ROLE_TAG: "compression", BENCHMARKS_TAG: benchmarks_digest(evaluations)}
    condition = " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())
    runs = tracking.client.search_runs(
        [tracking.experiment_id], condition, max_results=RUNS_READ, order_by=["attributes.start_time DESC"]
    )
    latest, sha256 = {}, samples.record.figures["sha256"]
    for run in runs:
        metrics = run.data.metrics
        accuracy = {task: metrics.get(f"packed/{slug(task)}/accuracy") for task in evaluations}
        if run.info.run_id != tracking.run_id and "bits/linears/stored" in metrics and None not in accuracy.values():
            label = run.data.tags.get("bivlm.recipe", run.info.run_name)
            point = {
                "label": label,
                "stored_bits": metrics["bits/linears/stored"],
                "accuracy": accuracy,
                "kl": metrics.get("kl") if run.data.tags.get(SAMPLES_TAG) == sha256 else None,
                "this_run": False,
            }
            latest.setdefault(label, point)
    return list(latest.values())


@task(name="log-documents", **OVER_NETWORK)
def log_documents(
    tracking: Tracking,
    folder: str,
    description: str,
    layers: list[dict[str, Any]],
    points: list[dict[str, Any]],
    chance: dict[str, float],
    measured_on: str | None,
) -> None:
    """The page and the records that lie in `folder`, every figure and a description, on the parent run."""
    client = tracking.client
    files = [Path(folder) / name for name in (PAGE, LINEAGE, REPORT)]
    state = digest([file_digest(file) for file in files])
    if client.get_run(tracking.run_id).data.tags.get(DOCUMENTS_TAG) == state:
        return
    lineage = read_lineage(folder)
    made_with = {f"bivlm.code.{key}": value for key, value in lineage.code.items()}
    made_on = {f"bivlm.hardware.{key}": value for key, value in lineage.hardware.items()}
    said = made_with | made_on | {NOTE_TAG: description}
    # In one request: a server that asks for passwords takes a good part of a second for each.
    client.log_batch(tracking.run_id, tags=[RunTag(tag, str(value)) for tag, value in said.items()])
    for file in files:
        client.log_artifact(tracking.run_id, str(file))
    for name, figure in _figures(layers, points, chance, measured_on):
        client.log_text(tracking.run_id, figures.svg(figure), f"figures/{name}.svg")
    # Last, because it says that all of the above is there.
    client.set_tag(tracking.run_id, DOCUMENTS_TAG, state)


def _figures(
    layers: list[dict[str, Any]],
    points: list[dict[str, Any]],
    chance: dict[str, float],
    measured_on: str | None,
) -> Iterator[tuple[str, Any]]:
    yield "weight_histogram", figures.weight_histogram(layers)
    yield "kl_per_layer", figures.kl_per_layer(layers)
    yield "error_by_p_max", figures.error_by_p_max(layers)
    yield "bits_and_error", figures.bits_and_error(layers)
    if points:
        yield "accuracy_against_bits", figures.accuracy_against_bits(points, chance, measured_on)
