"""The compression of one model: the order of things, from a base checkpoint to a registered candidate."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from prefect import Task, flow, unmapped
from prefect.task_runners import ThreadPoolTaskRunner
from rich.console import Console

from bivlm.checkpoint import select
from bivlm.evaluation import load_benchmark
from bivlm.memory import peak_bytes, reset_peak
from bivlm.recipe import Recipe, load_recipe, parse_recipe
from bivlm.stores.location import default_workspace
from bivlm.workspace import Workspace
from flows.progress import FlowProgress
from tasks import binarization, calibration, checkpoint, evaluation, grouping, saliency, tracking
from tasks.device import Device, choose_device, provide_gpu_slot
from tasks.layers import Layer, in_chunks, layers_of
from tasks.naming import model_name
from tasks.policy import halves, is_out_of_memory
from tasks.progress import shown_by
from tasks.report import code_version, earlier_report, write_report
from tasks.steps import Done


@dataclass(frozen=True)
class Results:
    """What both models can do: evaluations by benchmark, and the divergence between them."""

    full_precision: dict[str, Done]
    packed: dict[str, Done]
    divergence: Done


# Each worker holds one layer; more of them than cores would only add memory.
WORKERS = min(4, os.cpu_count() or 1)


@flow(
    name="compress",
    flow_run_name="compress-{output}",
    task_runner=ThreadPoolTaskRunner(max_workers=WORKERS),
    persist_result=False,
)
def compress_flow(
    model: str,
    recipe: str | dict[str, Any],
    output: str,
    revision: str | None = None,
    workspace: str | None = None,
    evaluate: bool = True,
    questions: int | None = None,
) -> dict[str, Any]:
    """Compress `model` by `recipe` into the folder `output`; returns what the command line and the demo print.

    `recipe` is a shipped name, a file or the recipe itself. `workspace` is a folder or ``s3://bucket/prefix`` (default:
    `bivlm.stores.location.default_workspace`). `questions` limits every benchmark to its first questions. What the
    workspace, the output folder and MLflow already hold of an identical request is not done again. Raises `InputError`
    for anything the caller can mend.
    """
    chosen_recipe = load_recipe(recipe) if isinstance(recipe, str) else parse_recipe(recipe)
    output = str(Path(output).expanduser().absolute())
    store = Workspace.open(workspace or default_workspace())
    benchmarks = list(chosen_recipe.evaluation) if evaluate else []
    asked = {benchmark: len(load_benchmark(benchmark, questions)) for benchmark in benchmarks}
    device = choose_device()
    provide_gpu_slot(device)
    base = checkpoint.resolve_base(model, revision, output)
    chosen, _kept = select(base.linears, chosen_recipe)
    layers = layers_of(chosen, chosen_recipe, str(base.model.folder), base.sha256)
    tracked = tracking.find_or_create_run(store, base, chosen_recipe)
    stages = {
        calibration.STAGE: 1,
        saliency.STAGE: len(layers),
        grouping.STAGE: len(layers),
        binarization.STAGE: len(layers),
        checkpoint.STAGE: 1,
        **({evaluation.STAGE: 2 * sum(asked.values()), evaluation.DIVERGENCE_STAGE: 2} if evaluate else {}),
        tracking.STAGE: 1,
    }
    title = f"{model_name(base.model)} with {chosen_recipe.name}"
    progress = FlowProgress(stages, Console(stderr=True), title)
    # From here to the written checkpoint is what the report calls the compression.
    started = time.perf_counter()
    reset_peak()
    with tracking.ends_run(tracked), progress, shown_by(progress):
        samples = calibration.freeze_calibration(chosen_recipe.calibration.model_dump(mode="json"), store.url)
        layers, shards = pack_all(layers, store.url, progress.publish)
        packed = checkpoint.write_checkpoint(base, chosen, shards, {"code_version": code_version()}, output, store.url)
        report = earlier_report(output, base, chosen_recipe) if packed.step.reused else None
        if report is None:
            report = write_report(
                base,
                chosen_recipe,
                layers,
                shards,
                output,
                seconds=time.perf_counter() - started,
                peak_memory_bytes=peak_bytes(),
            )
        progress.publish()
        results = None
        if evaluate:
            results = _evaluate(base, packed, samples, benchmarks, questions, device, store.url, progress.publish)
        registered = _track(tracked, base, chosen_recipe, packed, report, samples, results, store.url)
        progress.advance(tracking.STAGE)
    return {
        "output": output,
        "report": str(Path(output) / "compression_report.json"),
        "packed_sha256": packed.sha256,
        "reused": packed.step.reused,
        "bits": report["bits"],
        "seconds": report["seconds"],
        "peak_memory_bytes": report["peak_memory_bytes"],
        "evaluation": _figures(results),
        "mlflow": {
            "tracking_uri": tracked.uri,
            "run_id": tracked.run_id,
            "ui": tracking.ui_command(tracked.uri),
            "page": tracking.run_page(tracked),
            **registered,
        },
    }


def pack_all(
    layers: Sequence[Layer], workspace: str, publish: Callable[[], None]
) -> tuple[list[Layer], dict[str, Done]]:
    """The layers with their statistics and plans, and the shard of each by name."""
    measured = _in_chunks(saliency.measure_layers, layers, workspace, publish)
    layers = [replace(layer, statistics=measured[layer.name]) for layer in layers]
    planned = _in_chunks(grouping.plan_layers, layers, workspace, publish)
    layers = [replace(layer, plan=planned[layer.name]) for layer in layers]
    return layers, _in_chunks(binarization.pack_layers, layers, workspace, publish)


def _in_chunks(
    stage: Task[..., dict[str, Done]], layers: Sequence[Layer], workspace: str, publish: Callable[[], None]
) -> dict[str, Done]:
    """Run a stage over all layers, chunks side by side.

    A chunk that ran out of memory is done again in halves, one at a time, down to single layers.
    """
    done: dict[str, Done] = {}
    too_large = []
    chunks = in_chunks(layers, WORKERS)
    futures = stage.map(chunks, unmapped(workspace))
    for chunk, future in zip(chunks, futures, strict=True):
        result = future.result(raise_on_failure=False)
        if not isinstance(result, BaseException):
            done |= result
        elif is_out_of_memory(result):
            too_large.append(chunk)
        else:
            raise result
        publish()
    while too_large:
        chunk = too_large.pop(0)
        state = stage(chunk, workspace, return_state=True)
        result = state.result(raise_on_failure=False)
        if not isinstance(result, BaseException):
            done |= result
        elif is_out_of_memory(result) and len(chunk) > 1:
            too_large = [*halves(chunk), *too_large]
        else:
            raise result
    return done


def _evaluate(
    base: checkpoint.Base,
    packed: checkpoint.PackedCheckpoint,
    samples: Done,
    benchmarks: Sequence[str],
    questions: int | None,
    device: Device,
    workspace: str,
    publish: Callable[[], None],
) -> Results:
    """Full precision first (once per base model, whatever the recipe), then the packed checkpoint as it is stored.

    One after the other: each already uses all cores, or the one GPU, and a model is loaded once for its benchmarks.
    """

    def ask(folder: str, sha256: str) -> dict[str, Done]:
        done = {}
        for benchmark in benchmarks:
            done[benchmark] = evaluation.evaluate_checkpoint(folder, sha256, benchmark, questions, device, workspace)
            publish()
        return done

    folder = str(base.model.folder)
    try:
        full_precision = ask(folder, base.sha256)
        logits = evaluation.compute_reference_logits(folder, base.sha256, samples, device, workspace)
        asked = ask(packed.folder, packed.sha256)
        divergence = evaluation.measure_divergence(packed.folder, packed.sha256, samples, logits, device, workspace)
        publish()
    finally:
        evaluation.forget_models()
    return Results(full_precision, asked, divergence)


def _track(
    tracked: tracking.Tracking,
    base: checkpoint.Base,
    recipe: Recipe,
    packed: checkpoint.PackedCheckpoint,
    report: dict[str, Any],
    samples: Done,
    results: Results | None,
    workspace: str,
) -> dict[str, Any]:
    """Everything into MLflow; returns what names the model there."""
    model_id = tracking.log_model(tracked, base, recipe, packed.folder, packed.sha256)
    tracking.log_compression(tracked, report, packed.sha256, samples, model_id)
    if results is not None:
        base_id = tracking.log_base_model(tracked, base)
        for done in results.full_precision.values():
            tracking.log_evaluation(tracked, "full precision", base.sha256, done, base_id, workspace)
        for done in results.packed.values():
            tracking.log_evaluation(tracked, "packed", packed.sha256, done, model_id, workspace)
        tracking.log_comparison(tracked, results.full_precision, results.packed, results.divergence, samples, model_id)
    name, version = tracking.register(tracked, base, recipe, model_id)
    return {"model_id": model_id, "registered_model": name, "version": version}


def _figures(results: Results | None) -> dict[str, Any] | None:
    """Accuracy (percent) of both models by benchmark, and KL (nats a token)."""
    if results is None:
        return None

    def short(evaluations: dict[str, Done]) -> dict[str, Any]:
        return {
            benchmark: {key: done.record.figures[key] for key in ("n", "metrics", "ci95")} | {"reused": done.reused}
            for benchmark, done in evaluations.items()
        }

    return {
        "full_precision": short(results.full_precision),
        "packed": short(results.packed),
        "kl": results.divergence.record.figures["kl"],
    }
