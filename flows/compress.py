"""The compression of one model: the order of things, from a base checkpoint to a registered candidate."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from prefect import flow, runtime
from prefect.client.schemas.objects import State
from rich.console import Console

from bivlm.checkpoint.outputs import PAGE, lock_of
from bivlm.checkpoint.reading import REPORT, TABLES_KEY
from bivlm.checkpoint.remote_code import remote_code_allowed, trust
from bivlm.errors import GateNotPassed
from bivlm.recipe.loading import load_recipe, parse_recipe
from bivlm.recipe.pruning import PRUNING_KEY
from bivlm.recipe.selection import select
from bivlm.workspace.garbage import in_use
from bivlm.workspace.locks import one_machine_at_a_time
from bivlm.workspace.memory import peak_bytes, reset_peak
from bivlm.workspace.places import check_places, output_folder, output_place
from bivlm.workspace.steps import Workspace
from bivlm.workspace.stores.location import default_workspace
from flows.estimates import refuse_what_cannot_fit
from flows.gate import decide_at_the_end, refuse_what_cannot_be_decided, refused_state
from flows.layers import finish_all, needs_calibration, pack_all, side_by_side
from flows.origin import trigger_of_run
from flows.progress import FlowProgress, publish_page
from flows.pruning import questions_of_sweep
from flows.recording import record
from flows.request import Request
from flows.results import evaluate_both, sweep_both
from flows.runners import parse_runner, started
from tasks import (
    binarization,
    block_inputs,
    calibration,
    checkpoint,
    curves,
    evaluation,
    finishing,
    grouping,
    pruning,
    saliency,
    tracking,
)
from tasks import block_search as search
from tasks import embeddings as tables
from tasks.garbage import note_registry
from tasks.layers import layers_of
from tasks.report import code_version, earlier_report, full_precision_bits, make_report, report_text, write_records
from tasks.runtime.device import choose_device
from tasks.runtime.locks import one_at_a_time
from tasks.runtime.naming import model_name
from tasks.runtime.progress import shown_by


def _run_name() -> str:
    """Model and recipe as they were asked for, whatever is wrong with them."""
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
) -> dict[str, Any]:
    """Compress `model` by `recipe` into the folder `output`; returns what the command line and the demo print.

    `recipe` is a shipped name, a file or the recipe itself. `workspace` is a folder or ``s3://bucket/prefix`` (default:
    `bivlm.workspace.stores.location.default_workspace`). `questions` limits every benchmark to its first questions;
    `quiet` shows no progress in the terminal. `runner` and `workers` say who works on the layers, see
    `flows.runners.parse_runner`; the bytes are the same whoever does. `check` refuses what cannot fit into this
    machine's memory and onto its disks. What the workspace, the output folder and MLflow already hold of an identical
    request is not done again. `trigger` says what asked for it, for its lineage (default: what Prefect knows, see
    `flows.origin.trigger_of_run`).

    A recipe's gate decides at the end, see `flows.gate.decide_at_the_end`. Raises `GateNotPassed`, with all that would
    have been returned, if a bound of it is not kept, and `InputError` for anything the caller can mend.
    """
    chosen_runner = parse_runner(runner, workers)
    chosen_recipe = load_recipe(recipe) if isinstance(recipe, str) else parse_recipe(recipe)
    output = str(output_folder(output))
    check_places([output_place(Path(output))], [model], workspace, chosen_recipe.data())
    store = Workspace.open(workspace or default_workspace())
    refuse_what_cannot_be_decided(chosen_recipe, evaluate)
    names = chosen_recipe.evaluation if evaluate else ()
    benchmarks = {name: evaluation.open_benchmark(name, questions) for name in names}
    base = checkpoint.resolve_base(model, revision, output, chosen_recipe.modules)
    chosen, _kept = select(base.linears, chosen_recipe)
    packed_tables = tables.tables_of(base, chosen_recipe, chosen)
    request = Request(
        base,
        chosen_recipe,
        chosen,
        packed_tables,
        output,
        store,
        benchmarks,
        questions,
        choose_device(),
        chosen_runner,
        trigger_of_run(trigger),
    )
    if check:
        places = [store.local, Path(output)]
        answers = 2 * sum(map(len, benchmarks.values()))
        refuse_what_cannot_fit(base.open(), base.parts, chosen_recipe, answers, chosen_runner, places)
    console = Console(stderr=True, quiet=quiet)

    def wait() -> None:
        console.print("another process is busy with the same compression or the same output: waiting for it")

    # Two identical requests at once would both find nothing done and do all of it twice, MLflow's runs included; two
    # that write one folder would report on each other's files.
    request_digest = tracking.request_digest(base, chosen_recipe)
    same_request = store.local / "locks" / f"{request_digest}.lock"
    with (
        in_use(store),
        one_at_a_time(same_request, wait),
        one_machine_at_a_time(store, request_digest, wait),
        one_at_a_time(lock_of(Path(output)), wait, left=False),
    ):
        return _compress(request, console)


def _compress(request: Request, console: Console) -> dict[str, Any] | State[Any]:
    base, recipe, store = request.base, request.recipe, request.store
    # Absolute, because workers on other machines look there, too.
    layers = layers_of(request.chosen, recipe, str(base.model.folder.absolute()), base.digests.tensors)
    calibrated = needs_calibration(layers, recipe.budget, recipe.search)
    varied = curves.varied_layers(layers)
    tracked = tracking.find_or_create_run(store.url, base, recipe, request.trigger)
    publish_page(tracking.run_page(tracked))
    note_registry(store.url, tracked.uri)
    answers = 2 * sum(map(len, request.benchmarks.values()))
    swept = recipe.pruning.sweep if recipe.pruning and answers else None
    in_sweep = questions_of_sweep(swept, request.benchmarks.values(), models=2) if swept else {}
    stages = {
        calibration.STAGE: 1,
        saliency.STAGE: len(layers),
        grouping.STAGE: len(layers),
        **({block_inputs.STAGE: 1} if calibrated else {}),
        **({search.STAGE: 1} if recipe.search else {}),
        binarization.STAGE: len(layers),
        **({finishing.STAGE: recipe.finish.steps} if recipe.finish else {}),
        **({tables.STAGE: len(request.tables)} if request.tables else {}),
        checkpoint.STAGE: 1,
        **({evaluation.STAGE: answers + in_sweep.get(evaluation.STAGE, 0)} if answers else {}),
        **({evaluation.DIVERGENCE_STAGE: 2} if answers else {}),
        **({pruning.STAGE: in_sweep[pruning.STAGE]} if swept else {}),
        curves.STAGE: len(varied),
        tracking.STAGE: 1,
    }
    progress = FlowProgress(stages, console, f"{model_name(base.model)} with {recipe.name}")
    # From here to the written checkpoint is what the report calls the compression.
    started_at = time.perf_counter()
    reset_peak()
    with tracking.ends_run(tracked), progress, shown_by(progress):
        samples = calibration.freeze_calibration(recipe.calibration.model_dump(mode="json"), store.url)
        inputs = (
            block_inputs.encode_samples(base, recipe.calibration, samples, request.device, store.url)
            if calibrated
            else None
        )
        with started(request.runner) as workers:
            done = pack_all(layers, store.url, progress.publish, workers, inputs, recipe.budget, recipe.search)
        if recipe.finish is not None:
            done = finish_all(done, base, samples, recipe.finish, request.device, store.url)
            progress.publish()
        done = replace(done, tables={table.name: tables.pack_one(table, store.url) for table in request.tables})
        setting = recipe.pruning.setting if recipe.pruning else None
        settings = {"code_version": code_version()}
        settings |= {PRUNING_KEY: setting.model_dump(mode="json")} if setting else {}
        settings |= {TABLES_KEY: list(done.tables)} if done.tables else {}
        packed = checkpoint.write_checkpoint(
            base,
            [*request.chosen, *(table.linear for table in request.tables)],
            done.shards | done.tables,
            settings,
            request.output,
            store.url,
        )
        if remote_code_allowed(base.model.folder):  # it came along, byte for byte
            trust([packed.folder])
        report = earlier_report(packed.folder, base, recipe) if packed.step.reused else None
        if report is None:
            report = make_report(
                base,
                recipe,
                done.layers,
                done.shards,
                request.tables,
                done.tables,
                packed.folder,
                seconds=time.perf_counter() - started_at,
                peak_memory_bytes=peak_bytes(),
                runner=request.runner.described,
            )
            # At once where it is new, and so not yet in its place: a run that resumes finds what this one took.
            if not packed.step.reused:
                write_records(packed.folder, {REPORT: report_text(report)})
        progress.publish()
        results = evaluate_both(request, packed, samples, progress.publish) if request.benchmarks else None
        measured = {}
        if varied:
            # Anew, so that no worker was kept waiting, in memory, while models were asked.
            with started(request.runner) as workers:
                measured = side_by_side(curves.measure_curves, varied, store.url, progress.publish, workers)
        sweep = sweep_both(request, packed, progress.publish) if swept is not None else None
        report, registered = record(request, tracked, done, samples, packed, report, results, measured, sweep)
        checkpoint.put_in_place(packed, request.output)
        gate, refused = decide_at_the_end(recipe, tracked, registered, report, results, store.url)
        progress.advance(tracking.STAGE)
    result = {
        "output": request.output,
        "report": str(Path(request.output) / REPORT),
        "page": str(Path(request.output) / PAGE),
        "packed_sha256": packed.sha256,
        "reused": packed.step.reused,
        "base_model": report["base_model"],
        "model_name": model_name(base.model),
        "full_precision_bits": full_precision_bits(base),
        "bits": report["bits"],
        "relative_error": report["relative_error"],
        "warnings": report["warnings"],
        "calibrated": calibrated or recipe.finish is not None,
        "seconds": report["seconds"],
        "peak_memory_bytes": report["peak_memory_bytes"],
        "evaluation": results.figures() if results else None,
        "gate": gate,
        "mlflow": {
            "tracking_uri": tracking.public_uri(tracked.uri),
            "run_id": tracked.run_id,
            "ui": tracking.ui_command(tracked.uri),
            "page": tracking.run_page(tracked),
            **registered,
        },
    }
    # After the run in MLflow was ended as finished: all of it is there.
    if refused is not None:
        return refused_state(GateNotPassed(refused, result))
    return result
