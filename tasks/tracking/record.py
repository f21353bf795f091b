"""What a compression and its evaluations measured: metrics, tables, data sets, child runs."""

from __future__ import annotations

import itertools
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, LoggedModelInput, Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from prefect import task

from bivlm.evaluation.chance import AtChance
from bivlm.workspace.hashing import digest
from tasks.runtime.naming import slug
from tasks.runtime.policy import OVER_NETWORK
from tasks.runtime.steps import StepResult, open_workspace
from tasks.tracking.documents import BENCHMARKS_TAG, SAMPLES_TAG, benchmarks_digest
from tasks.tracking.run import REQUEST_TAG, ROLE_TAG, Tracking, find_run

PACKED_TAG = "bivlm.packed.sha256"
CHANCE_TAG = "bivlm.not_above_chance"  # of a run and a version: the sentences of `AtChance`, or none
NONE = "none"
LONGEST = 4000  # of the 5,000 characters that the registry's columns have
SUBJECT_TAG = "bivlm.evaluated"  # checkpoint and benchmark of an evaluation
_ATTEMPTS = 5  # at what others write down at the same moment


@dataclass(frozen=True)
class LoggedData:
    """A data set as MLflow knows it; `digest` is cut to the 36 characters that MLflow allows."""

    name: str
    digest: str
    source: str
    samples: int

    def entity(self) -> Dataset:
        return Dataset(
            name=self.name,
            digest=self.digest,
            source_type="bivlm",
            source=json.dumps({"uri": self.source}),
            profile=json.dumps({"num_samples": self.samples}),
        )


def benchmark_data(evaluation: StepResult) -> LoggedData:
    """The data set of an evaluation."""
    figures = evaluation.record.figures
    return LoggedData(slug(figures["task"]), figures["benchmark_sha256"][:32], figures["task"], figures["n"])


def calibration_data(calibration: StepResult) -> LoggedData:
    """The calibration samples as a data set."""
    figures = calibration.record.figures
    return LoggedData(
        "calibration." + slug(figures["source"]), figures["sha256"][:32], figures["source"], figures["samples"]
    )


@task(name="log-compression", **OVER_NETWORK)
def log_compression(
    tracking: Tracking, report: dict[str, Any], packed_sha256: str, calibration: StepResult, model_id: str
) -> None:
    """Bits, layers, recipe and calibration set on the parent run; metrics belong to the logged model, too."""
    client, run = tracking.client, tracking.client.get_run(tracking.run_id)
    if run.data.tags.get(PACKED_TAG) == packed_sha256:
        return
    bits = report["bits"]
    metrics = {
        "seconds": report["seconds"],
        "peak_memory_bytes": report["peak_memory_bytes"],
        **{f"bits/linears/{key}": value for key, value in bits["linears"].items()},
        **{f"bits/tables/{key}": value for key, value in (bits["tables"] or {}).items()},
        **{f"bits/model/{key}": value for key, value in bits["model"].items()},
        **{
            f"bits/{component}/{key}": value
            for component, figures in bits["by_component"].items()
            for key, value in figures.items()
        },
    }
    _log_metrics(client, tracking.run_id, metrics, model_id=model_id)
    data = DatasetInput(calibration_data(calibration).entity(), [InputTag("mlflow.data.context", "calibration")])
    log_inputs(client, tracking.run_id, [data])
    client.log_text(tracking.run_id, json.dumps(report["recipe"], indent=2, ensure_ascii=False), "recipe.json")
    if "mlflow.loggedArtifacts" not in run.data.tags:  # log_table appends to a table that is there
        client.log_table(tracking.run_id, _layer_table(report["layers"]), "layers.json")
    # Last, because it says that all of the above is there.
    client.set_tag(tracking.run_id, PACKED_TAG, packed_sha256)


@task(name="log-evaluation", **OVER_NETWORK)
def log_evaluation(
    tracking: Tracking, role: str, sha256: str, evaluation: StepResult, model_id: str, workspace: str
) -> None:
    """A child run for one model on one benchmark, its metrics linked to model and data set."""
    client, figures, data = tracking.client, evaluation.record.figures, benchmark_data(evaluation)
    subject = digest({"checkpoint": sha256, "step": evaluation.key})
    tags = {REQUEST_TAG: tracking.request, ROLE_TAG: role, SUBJECT_TAG: subject}
    run = find_run(client, tracking.experiment_id, tags)
    if run is not None and run.info.status == "FINISHED":
        return
    if run is None:
        tags |= {"mlflow.parentRunId": tracking.run_id, "mlflow.source.name": "bivlm compress"}
        name = f"{figures['task']} · {role} · {tracking.label}"
        run = client.create_run(tracking.experiment_id, run_name=name, tags=tags)
    run_id = run.info.run_id
    client.log_batch(run_id, params=[Param("task", figures["task"]), Param("checkpoint", sha256)])
    asked = DatasetInput(data.entity(), [InputTag("mlflow.data.context", "evaluation")])
    log_inputs(client, run_id, [asked], [LoggedModelInput(model_id=model_id)])
    low, high = figures["ci95"]
    metrics = {**figures["metrics"], "accuracy_ci95_low": low, "accuracy_ci95_high": high, "questions": figures["n"]}
    for name, (low, high) in figures.get("intervals", {}).items():
        metrics |= {f"{name}_ci95_low": low, f"{name}_ci95_high": high}
    _log_metrics(client, run_id, metrics, model_id=model_id, data=data)
    with tempfile.TemporaryDirectory() as folder:
        for name, reference in evaluation.record.outputs.items():
            open_workspace(workspace).fetch_folder({name: reference}, folder)
        client.log_artifacts(run_id, folder)
    client.set_terminated(run_id, "FINISHED")


@task(name="log-comparison", **OVER_NETWORK)
def log_comparison(
    tracking: Tracking,
    full_precision: dict[str, StepResult],
    packed: dict[str, StepResult],
    divergence: StepResult,
    calibration: StepResult,
    model_id: str,
    at_chance: Sequence[AtChance],
) -> None:
    """What the parent run says at a glance: accuracies of both models, and the divergence (linked to the model)."""
    client = tracking.client
    tags = {
        BENCHMARKS_TAG: benchmarks_digest(packed),
        SAMPLES_TAG: calibration.record.figures["sha256"],
        CHANCE_TAG: chance_in_words(at_chance),
    }
    client.log_batch(tracking.run_id, tags=[RunTag(key, value) for key, value in tags.items()])
    metrics = {
        f"{role}/{slug(benchmark)}/accuracy": done.record.figures["metrics"]["accuracy"]
        for role, evaluations in (("full_precision", full_precision), ("packed", packed))
        for benchmark, done in evaluations.items()
    }
    log_new_metrics(client, tracking.run_id, metrics)
    kl = {"kl": divergence.record.figures["kl"]}
    log_new_metrics(client, tracking.run_id, kl, model_id=model_id, data=calibration_data(calibration))


def chance_in_words(found: Sequence[AtChance]) -> str:
    """Return the value of `CHANCE_TAG`."""
    return "; ".join(map(str, found))[:LONGEST] or NONE


def log_inputs(
    client: MlflowClient, run_id: str, datasets: list[DatasetInput], models: list[LoggedModelInput] | None = None
) -> None:
    """What a run has read.

    MLflow looks whether it knows a data set, and writes it down if not: of two runs that do so at once one is refused
    by its database, and finds the data set the next time.
    """
    for attempt in itertools.count(1):
        try:
            return client.log_inputs(run_id, datasets=datasets, models=models)
        except MlflowException as error:
            if attempt == _ATTEMPTS or "unique constraint" not in str(error).lower():
                raise


def log_new_metrics(
    client: MlflowClient,
    run_id: str,
    metrics: dict[str, float],
    model_id: str | None = None,
    data: LoggedData | None = None,
) -> None:
    """Those that the run does not have yet, or has otherwise."""
    known = client.get_run(run_id).data.metrics
    new = {key: value for key, value in metrics.items() if known.get(slug(key, "/")) != value}
    _log_metrics(client, run_id, new, model_id=model_id, data=data)


def _log_metrics(
    client: MlflowClient,
    run_id: str,
    metrics: dict[str, float | None],
    model_id: str | None = None,
    data: LoggedData | None = None,
) -> None:
    now = int(time.time() * 1000)
    link = {"dataset_name": data.name, "dataset_digest": data.digest} if data else {}
    entries = [
        Metric(slug(key, "/"), float(value), now, 0, model_id=model_id, run_id=run_id if model_id else None, **link)
        for key, value in metrics.items()
        if value is not None
    ]
    for start in range(0, len(entries), 500):
        client.log_batch(run_id, metrics=entries[start : start + 500])


def _layer_table(layers: list[dict[str, Any]]) -> dict[str, list[Any]]:
    rows = [
        {key: value for key, value in layer.items() if key not in ("shape", "bits")}
        | {"shape": " x ".join(map(str, layer["shape"]))}
        | {f"bits_{key}": value for key, value in layer["bits"].items()}
        for layer in layers
    ]
    return {key: [row[key] for row in rows] for key in rows[0]}
