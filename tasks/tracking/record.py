"""Write a compression and its evaluations to MLflow runs: metrics, tables, data sets, child runs, documents."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, LoggedModelInput, Metric, Param, RunTag
from prefect import task

from bivlm.checkpoint.outputs import PAGE
from bivlm.checkpoint.reading import LINEAGE, REPORT
from bivlm.evaluation.chance import AtChance
from bivlm.reports.lineage import read_lineage
from bivlm.workspace.hashing import digest, file_digest
from tasks.runtime.naming import slug
from tasks.runtime.policy import OVER_NETWORK
from tasks.runtime.steps import StepResult, open_workspace
from tasks.tracking.run import Tracking, find_run
from tasks.tracking.tags import LONGEST, NONE, Tag, having


def data_set(name: str, sha256: str, source: str, samples: int) -> Dataset:
    """Return a data set as MLflow knows it, whose digest has at most 36 characters."""
    profile = json.dumps({"num_samples": samples})
    return Dataset(name, sha256[:32], "bivlm", json.dumps({"uri": source}), profile=profile)


def benchmark_data(figures: Mapping[str, Any]) -> Dataset:
    """Return the data set of an evaluation with these figures."""
    return data_set(slug(figures["task"]), figures["benchmark_sha256"], figures["task"], figures["n"])


def calibration_data(figures: Mapping[str, Any]) -> Dataset:
    """Return the calibration samples with these figures as a data set."""
    source = figures["source"]
    return data_set(f"calibration.{slug(source)}", figures["sha256"], source, figures["samples"])


def as_input(data: Dataset, context: str) -> DatasetInput:
    """Return what a run has read, and what for."""
    return DatasetInput(data, [InputTag("mlflow.data.context", context)])


def benchmarks_digest(evaluations: Mapping[str, StepResult]) -> str:
    """Return a hash that is equal for two runs that asked the same questions."""
    return digest({task: done.record.figures["benchmark_sha256"] for task, done in evaluations.items()})


def chance_in_words(found: Sequence[AtChance]) -> str:
    """Return the value of `Tag.NOT_ABOVE_CHANCE`."""
    return "; ".join(map(str, found))[:LONGEST] or NONE


@task(name="log-compression", **OVER_NETWORK)
def log_compression(
    tracking: Tracking, report: Mapping[str, Any], packed_sha256: str, calibration: StepResult, model_id: str
) -> None:
    """Log bits, layers, recipe and calibration set on the parent run, the metrics on the logged model, too."""
    client, run = tracking.client, tracking.client.get_run(tracking.run_id)
    if run.data.tags.get(Tag.PACKED) == packed_sha256:
        return
    # First, because it may be refused and tried again: two runs may log the same new data set at once.
    client.log_inputs(tracking.run_id, [as_input(calibration_data(calibration.record.figures), "calibration")])
    bits = report["bits"]
    counted = {"linears": bits["linears"], "tables": bits["tables"] or {}, "model": bits["model"]}
    metrics = {"seconds": report["seconds"], "peak_memory_bytes": report["peak_memory_bytes"]}
    for part, figures in (counted | bits["by_component"]).items():
        metrics |= {f"bits/{part}/{key}": value for key, value in figures.items()}
    log_new_metrics(client, tracking.run_id, metrics, model_id)
    client.log_text(tracking.run_id, json.dumps(report["recipe"], indent=2, ensure_ascii=False), "recipe.json")
    if "mlflow.loggedArtifacts" not in run.data.tags:  # log_table appends to a table that is there
        client.log_table(tracking.run_id, _layer_table(report["layers"]), "layers.json")
    # Last, because it says that all of the above is there.
    client.set_tag(tracking.run_id, Tag.PACKED, packed_sha256)


@task(name="log-evaluation", **OVER_NETWORK)
def log_evaluation(
    tracking: Tracking, role: str, sha256: str, evaluation: StepResult, model_id: str, workspace: str
) -> None:
    """Log a child run for one model on one benchmark, its metrics linked to model and data set."""
    client, figures = tracking.client, evaluation.record.figures
    data = benchmark_data(figures)
    subject = digest({"checkpoint": sha256, "step": evaluation.key})
    tags = {Tag.REQUEST: tracking.request, Tag.ROLE: role, Tag.SUBJECT: subject}
    run = find_run(client, tracking.experiment_id, tags)
    if run is not None and run.info.status == "FINISHED":
        return
    if run is None:
        tags |= {Tag.PARENT: tracking.run_id, Tag.SOURCE: "bivlm compress"}
        name = f"{figures['task']} · {role} · {tracking.label}"
        run = client.create_run(tracking.experiment_id, run_name=name, tags=tags)
    run_id = run.info.run_id
    client.log_batch(run_id, params=[Param("task", figures["task"]), Param("checkpoint", sha256)])
    client.log_inputs(run_id, [as_input(data, "evaluation")], [LoggedModelInput(model_id=model_id)])
    intervals = {"accuracy": figures["ci95"], **figures.get("intervals", {})}
    metrics = {**figures["metrics"], "questions": figures["n"]}
    for name, (low, high) in intervals.items():
        metrics |= {f"{name}_ci95_low": low, f"{name}_ci95_high": high}
    log_new_metrics(client, run_id, metrics, model_id, data)
    with tempfile.TemporaryDirectory() as folder:
        for name, reference in evaluation.record.outputs.items():
            open_workspace(workspace).fetch_folder({name: reference}, folder)
        client.log_artifacts(run_id, folder)
    client.set_terminated(run_id, "FINISHED")


@task(name="log-comparison", **OVER_NETWORK)
def log_comparison(
    tracking: Tracking,
    full_precision: Mapping[str, StepResult],
    packed: Mapping[str, StepResult],
    divergence: StepResult,
    calibration: StepResult,
    model_id: str,
    at_chance: Sequence[AtChance],
) -> None:
    """Log accuracies of both models and the divergence on the parent run, the divergence linked to the model."""
    client = tracking.client
    tags = {
        Tag.BENCHMARKS: benchmarks_digest(packed),
        Tag.SAMPLES: calibration.record.figures["sha256"],
        Tag.NOT_ABOVE_CHANCE: chance_in_words(at_chance),
    }
    client.log_batch(tracking.run_id, tags=[RunTag(key, value) for key, value in tags.items()])
    metrics = {
        f"{role}/{slug(benchmark)}/accuracy": done.record.figures["metrics"]["accuracy"]
        for role, evaluations in (("full_precision", full_precision), ("packed", packed))
        for benchmark, done in evaluations.items()
    }
    log_new_metrics(client, tracking.run_id, metrics)
    kl = {name: value for name, value in divergence.record.figures.items() if value is not None}
    log_new_metrics(client, tracking.run_id, kl, model_id, calibration_data(calibration.record.figures))


@task(name="other-compressions", **OVER_NETWORK)
def other_points(
    tracking: Tracking, base_sha256: str, evaluations: Mapping[str, StepResult], samples: StepResult
) -> list[dict[str, Any]]:
    """Return stored bits, accuracy and KL of other compressions of this base model that answered the same questions.

    The latest of every recipe, as `bivlm.reports.figures.compression.accuracy_against_bits` draws them. A KL that was
    measured on other samples than `samples` is left out.
    """
    if not evaluations:
        return []
    same = {Tag.BASE_SHA256: base_sha256, Tag.ROLE: "compression", Tag.BENCHMARKS: benchmarks_digest(evaluations)}
    newest_first = ["attributes.start_time DESC"]
    runs = tracking.client.search_runs([tracking.experiment_id], having(same), order_by=newest_first)
    latest, sha256 = {}, samples.record.figures["sha256"]
    for run in runs:
        metrics = run.data.metrics
        accuracy = {task: metrics.get(f"packed/{slug(task)}/accuracy") for task in evaluations}
        if run.info.run_id != tracking.run_id and "bits/linears/stored" in metrics and None not in accuracy.values():
            label = run.data.tags.get(Tag.RECIPE, run.info.run_name)
            point = {
                "label": label,
                "stored_bits": metrics["bits/linears/stored"],
                "accuracy": accuracy,
                "kl": metrics.get("kl") if run.data.tags.get(Tag.SAMPLES) == sha256 else None,
                "this_run": False,
            }
            latest.setdefault(label, point)
    return list(latest.values())


@task(name="log-documents", **OVER_NETWORK)
def log_documents(
    tracking: Tracking,
    folder: str,
    description: str,
    figures: dict[str, str],
) -> None:
    """Log on the parent run the page and the records in `folder`, `figures` (SVG by name) and a description."""
    client = tracking.client
    files = [Path(folder) / name for name in (PAGE, LINEAGE, REPORT)]
    state = digest([file_digest(file) for file in files])
    if client.get_run(tracking.run_id).data.tags.get(Tag.DOCUMENTS) == state:
        return
    lineage = read_lineage(folder)
    tags = {Tag.CODE + key: value for key, value in lineage.code.items()}
    tags |= {Tag.HARDWARE + key: value for key, value in lineage.hardware.items()}
    # In one request: a server with passwords takes a good part of a second for each.
    said = (tags | {Tag.NOTE: description}).items()
    client.log_batch(tracking.run_id, tags=[RunTag(key, str(value)) for key, value in said])
    for file in files:
        client.log_artifact(tracking.run_id, str(file))
    for name, svg in figures.items():
        client.log_text(tracking.run_id, svg, f"figures/{name}.svg")
    # Last, because it says that all of the above is there.
    client.set_tag(tracking.run_id, Tag.DOCUMENTS, state)


def log_new_metrics(
    client: MlflowClient,
    run_id: str,
    metrics: Mapping[str, float | None],
    model_id: str | None = None,
    data: Dataset | None = None,
) -> None:
    """Log those metrics that the run does not have yet, or has with another value; linked to a model and a data set."""
    known, now = client.get_run(run_id).data.metrics, int(time.time() * 1000)
    link = {"dataset_name": data.name, "dataset_digest": data.digest} if data else {}
    link |= {"model_id": model_id, "run_id": run_id} if model_id else {}
    named = {slug(key, "/"): value for key, value in metrics.items() if value is not None}
    new = [Metric(key, float(value), now, 0, **link) for key, value in named.items() if known.get(key) != value]
    for start in range(0, len(new), 500):
        client.log_batch(run_id, metrics=new[start : start + 500])


def _layer_table(layers: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    rows = [
        {key: value for key, value in layer.items() if key not in ("shape", "bits")}
        | {"shape": " x ".join(map(str, layer["shape"]))}
        | {f"bits_{key}": value for key, value in layer["bits"].items()}
        for layer in layers
    ]
    return {key: [row[key] for row in rows] for key in rows[0]}
