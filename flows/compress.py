"""The compression of one model: prepare, quantize, measure, record, decide."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prefect import State, flow, runtime
from rich.console import Console

from bivlm.checkpoint.outputs import PAGE, lock_of
from bivlm.checkpoint.reading import REPORT
from bivlm.checkpoint.remote_code import remote_code_allowed, trust
from bivlm.compression.model import quantization_settings
from bivlm.errors import GateNotPassed
from bivlm.recipe.loading import read_recipe
from bivlm.workspace.environment import peak_bytes, reset_peak
from bivlm.workspace.garbage import in_use
from bivlm.workspace.locks import one_at_a_time, one_machine_at_a_time
from flows.estimates import refuse_what_cannot_fit
from flows.gate import decide_at_the_end, refuse_what_cannot_be_decided
from flows.layers import PackedLayers, finish_all, pack_all
from flows.progress import FlowProgress, publish_page
from flows.pruning import questions_of_sweep
from flows.recording import Recorded, record
from flows.request import Request, prepare
from flows.results import Measurements, measure
from flows.runners import parse_runner, started
from tasks import (
    binarization,
    block_inputs,
    block_search,
    calibration,
    checkpoint,
    curves,
    embeddings,
    evaluation,
    finishing,
    grouping,
    pruning,
    saliency,
    tracking,
)
from tasks.compressed import CompressedModel
from tasks.garbage import note_registry
from tasks.report import (
    Report,
    earlier_report,
    full_precision_bits,
    make_report,
    report_text,
    write_records,
)
from tasks.runtime.naming import model_name
from tasks.runtime.progress import shown_by
from tasks.runtime.states import failed_by
from tasks.runtime.steps import StepResult


def _run_name() -> str:
    """Return the model and the recipe as they were given, whatever is wrong with them."""
    asked = runtime.flow_run.parameters
    recipe = asked.get("recipe")
    return f"compress {asked.get('model')} by {recipe.get('name') if isinstance(recipe, dict) else recipe}"


@flow(name="compress", flow_run_name=_run_name, persist_result=False)
def compress_flow(
    model: str,
    recipe: str | dict[str, Any],
    output: str,
    revision: str | None = None,
    workspace: str | None = None,
    evaluate: bool = True,
    questions: int | None = None,
    quiet: bool = False,
    runner: str = "threads",
    workers: int | None = None,
    check: bool = True,
    trigger: str | None = None,
) -> dict[str, Any] | State:
    """Compress `model` by `recipe` into the folder `output`; returns what the command line and the demo print.

    `recipe` is a shipped name, a file or the recipe itself. `workspace` is a folder or ``s3://bucket/prefix`` (default:
    `bivlm.workspace.stores.location.default_workspace`). `questions` limits every benchmark to its first questions;
    `quiet` shows no progress in the terminal. `runner` and `workers` choose who works on the layers, see
    `flows.runners.parse_runner`; the bytes are the same for all of them. `check` refuses what cannot fit into this
    machine's memory and onto its disks. Whatever the workspace, the output folder and MLflow already hold of an
    identical request is reused. `trigger` names what requested it, for its lineage (default: what Prefect knows, see
    `flows.origin.trigger_of_run`).

    A recipe's gate decides at the end, see `flows.gate.decide_at_the_end`. Raises `GateNotPassed`, with the result, if
    one of its bounds is not kept, and `InputError` for anything the caller can correct.
    """
    chosen_runner = parse_runner(runner, workers)
    chosen = read_recipe(recipe)
    refuse_what_cannot_be_decided(chosen, evaluate)
    benchmarks = chosen.evaluation if evaluate else ()
    request = prepare(model, chosen, output, revision, workspace, benchmarks, questions, chosen_runner, trigger)
    if check:
        places = [request.store.local, Path(request.output)]
        base = request.base
        refuse_what_cannot_fit(base.open(), base.parts, request.recipe, request.answers, request.runner, places)
    console = Console(stderr=True, quiet=quiet)
    with _alone(request, console):
        return _compress(request, console)


@contextmanager
def _alone(request: Request, console: Console) -> Iterator[None]:
    """Wait until no other process works on the same request or the same output, and keep others out.

    Two identical requests at once would both find nothing done and do all of it twice, MLflow's runs included; two that
    write one folder would report on each other's files.
    """
    store, output = request.store, Path(request.output)

    def wait() -> None:
        console.print("another process is busy with the same compression or the same output: waiting for it")

    with (
        in_use(store),
        one_machine_at_a_time(store, tracking.request_digest(request.base, request.recipe), wait),
        one_at_a_time(lock_of(output), wait, left=False),
    ):
        yield


def _compress(request: Request, console: Console) -> dict[str, Any] | State:
    tracked = tracking.find_or_create_run(request.store.url, request.base, request.recipe, request.trigger)
    publish_page(tracking.run_page(tracked))
    note_registry(request.store.url, tracked.uri)
    title = f"{model_name(request.base.model)} with {request.recipe.name}"
    progress = FlowProgress(_units_by_stage(request), console, title)
    with tracking.ends_run(tracked), progress, shown_by(progress):
        model, report = quantize(request, progress.publish)
        measured = measure(request, model, progress.publish)
        recorded = record(request, tracked, model, report, measured)
        checkpoint.put_in_place(model.checkpoint, request.output)
        gate, refused = decide_at_the_end(
            request.recipe, tracked, recorded.registered, recorded.report, measured.results, request.store.url
        )
        progress.advance(tracking.STAGE)
    result = _describe(request, tracked, model, measured, recorded, gate)
    # After the run in MLflow was ended as finished: all of it is there.
    if refused is not None:
        return failed_by(GateNotPassed(refused, result))
    return result


def _units_by_stage(request: Request) -> dict[str, int]:
    """Return how many units every stage of the progress bar has, in the order of the work."""
    recipe, layers, answers, sweep = request.recipe, len(request.layers), request.answers, request.sweep
    in_sweep = questions_of_sweep(sweep, request.benchmarks.values(), models=2) if sweep else {}
    return {
        calibration.STAGE: 1,
        saliency.STAGE: layers,
        grouping.STAGE: layers,
        **({block_inputs.STAGE: 1} if request.needs_blocks else {}),
        **({block_search.STAGE: 1} if recipe.search else {}),
        binarization.STAGE: layers,
        **({finishing.STAGE: recipe.finish.steps} if recipe.finish else {}),
        **({embeddings.STAGE: len(request.embeddings)} if request.embeddings else {}),
        checkpoint.STAGE: 1,
        **({evaluation.STAGE: answers + in_sweep.get(evaluation.STAGE, 0)} if answers else {}),
        **({evaluation.DIVERGENCE_STAGE: 2} if answers else {}),
        **({pruning.STAGE: in_sweep[pruning.STAGE]} if sweep else {}),
        curves.STAGE: len(curves.varied_layers(request.layers)),
        tracking.STAGE: 1,
    }


def quantize(request: Request, publish: Callable[[], None]) -> tuple[CompressedModel, Report]:
    """Calibrate, pack the layers and embeddings, write the checkpoint, and report on it."""
    started_at = time.perf_counter()
    reset_peak()
    url = request.store.url
    samples = calibration.freeze_calibration(request.recipe.calibration, url)
    packed = _pack_layers(request, samples, publish)
    packed_embeddings = [(each, embeddings.pack_embedding(each, url)) for each in request.embeddings]
    shards = packed.shards | {embedding.name: step for embedding, step in packed_embeddings}
    written = checkpoint.write_checkpoint(
        request.base,
        request.packed,
        shards,
        quantization_settings(request.recipe, [embedding.name for embedding in request.embeddings]),
        request.output,
        url,
        packed.tuned,
    )
    if remote_code_allowed(request.base.model.folder):  # it came along, byte for byte
        trust([written.folder])
    model = CompressedModel(
        request.base,
        request.recipe,
        samples,
        packed.layers,
        packed.shards,
        packed_embeddings,
        packed.between,
        written,
        packed.tuned,
    )
    report = earlier_report(written.folder, request.base, request.recipe) if written.step.reused else None
    if report is None:
        seconds, runner = time.perf_counter() - started_at, request.runner.described
        report = make_report(model, seconds=seconds, peak_memory_bytes=peak_bytes(), runner=runner)
        # At once where it is new, and so not yet in its place: a run that resumes finds what this one took.
        if not written.step.reused:
            write_records(written.folder, {REPORT: report_text(report)})
    publish()
    return model, report


def _pack_layers(request: Request, samples: StepResult, publish: Callable[[], None]) -> PackedLayers:
    base, recipe, device, url = request.base, request.recipe, request.device, request.store.url
    inputs = None
    if request.needs_blocks:
        inputs = block_inputs.encode_samples(base, recipe.calibration, samples, device, url)
    with started(request.runner) as workers:
        packed = pack_all(request.layers, url, publish, workers, inputs, recipe)
    if recipe.finish is not None:
        leftovers = base.parts.leftovers(request.packed)
        packed = finish_all(packed, base, samples, recipe.finish, device, url, leftovers)
        publish()
    return packed


def _describe(
    request: Request,
    tracked: tracking.Tracking,
    model: CompressedModel,
    measured: Measurements,
    recorded: Recorded,
    gate: dict[str, Any] | None,
) -> dict[str, Any]:
    """Return what the flow returns."""
    report = recorded.report
    return {
        "output": request.output,
        "report": str(Path(request.output) / REPORT),
        "page": str(Path(request.output) / PAGE),
        "packed_sha256": model.checkpoint.sha256,
        "reused": model.checkpoint.step.reused,
        "base_model": report["base_model"],
        "model_name": model_name(request.base.model),
        "full_precision_bits": full_precision_bits(request.base),
        "bits": report["bits"],
        "relative_error": report["relative_error"],
        "warnings": report["warnings"],
        "calibrated": request.needs_blocks or request.recipe.finish is not None,
        "seconds": report["seconds"],
        "peak_memory_bytes": report["peak_memory_bytes"],
        "evaluation": measured.results.figures() if measured.results else None,
        "gate": gate,
        "mlflow": {
            "tracking_uri": tracking.public_uri(tracked.uri),
            "run_id": tracked.run_id,
            "ui": tracking.ui_command(tracked.uri),
            "page": tracking.run_page(tracked),
            **recorded.registered,
        },
    }
