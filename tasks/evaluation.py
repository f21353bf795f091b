"""Evaluate the full-precision and the packed model: accuracy per benchmark, and the divergence between them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path

import pandas as pd
from prefect import task
from transformers import PreTrainedModel, ProcessorMixin

from bivlm.calibration.frozen import load_held_out
from bivlm.checkpoint.reading import Checkpoint
from bivlm.errors import InputError
from bivlm.evaluation.benchmark import Benchmark, load_benchmark
from bivlm.evaluation.divergence import kl_divergence, reference_logits
from bivlm.evaluation.generation import default_batch_size, load_model
from bivlm.evaluation.outcomes import evaluate, read_outcomes, write_outcomes
from bivlm.evaluation.paired import LargestLoss, largest_loss, loss_between
from bivlm.pruning.dropping import pruned_if
from bivlm.recipe.pruning import PruningSettings
from bivlm.sources.samples import CalibrationSample
from bivlm.workspace.hashing import step_identity
from bivlm.workspace.steps import Workspace
from tasks.runtime.device import Device, HeldModel, gpu_slot
from tasks.runtime.policy import OVER_NETWORK, smaller_after_out_of_memory
from tasks.runtime.progress import Restartable, advance
from tasks.runtime.steps import Figures, StepResult, do_step, open_workspace

STAGE = "evaluation"
LOGITS_STAGE = "reference logits"
DIVERGENCE_STAGE = "divergence"
VERSION = 2  # raised when a CPU computes in another dtype, too
DIVERGENCE_VERSION = 3  # of both steps; raised when held-out samples took the place of those calibrated on
OUTCOMES_FILE = "outcomes.parquet"
LOGITS_FILE = "logits.safetensors"


@task(name="benchmark", **OVER_NETWORK)
def open_benchmark(benchmark: str, limit: int | None) -> Benchmark:
    """Open the benchmark, whose questions may have to be fetched from the hub; raises `InputError`."""
    return load_benchmark(benchmark, limit)


@task(name="evaluate", task_run_name="evaluate-{benchmark}", **OVER_NETWORK)
def evaluate_checkpoint(
    folder: str,
    sha256: str,
    benchmark: str,
    limit: int | None,
    device: Device,
    workspace: str,
    pruning: PruningSettings | None = None,
) -> StepResult:
    """Evaluate a checkpoint on a benchmark, dropping tokens with `pruning`; figures as `Evaluation.record`."""
    store = open_workspace(workspace)
    questions = load_benchmark(benchmark, limit)
    inputs = {"checkpoint": sha256, "benchmark": questions.digest}
    part = {"task": benchmark, **_if_pruned(pruning)}
    identity = step_identity(STAGE, VERSION, inputs, part, exact=False, device=device.kind)
    bar = Restartable(STAGE)

    def ask(place: Path) -> Figures:
        model, processor = loaded_model(folder, sha256, device)
        with pruned_if(model, pruning, Checkpoint.open(folder).modules):
            result = smaller_after_out_of_memory(
                lambda size: evaluate(
                    model, processor, questions, batch_size=size, progress=lambda answered, _: bar.reach(answered)
                ),
                default_batch_size(model),
            )
        write_outcomes(result.outcomes, place / OUTCOMES_FILE)
        return {**result.record(), "benchmark_sha256": questions.digest, "name": questions.name}

    done = do_step(store, identity, ask)
    bar.reach(len(questions))
    return done


@task(name="paired-losses", **OVER_NETWORK)
def paired_losses(before: dict[str, StepResult], after: dict[str, StepResult], workspace: str) -> dict[str, Figures]:
    """Return what the second model lost against the first by benchmark, question by question: `Loss` as a dict."""
    store = open_workspace(workspace)
    return {
        name: asdict(loss_between(outcomes_of(before[name], store), outcomes_of(after[name], store))) for name in after
    }


@task(name="largest-losses", **OVER_NETWORK)
def largest_losses(
    before: dict[str, StepResult], after: dict[str, StepResult], confidence: float, workspace: str
) -> dict[str, LargestLoss]:
    """Return by benchmark the most that the second model may have lost against the first, with this confidence."""
    store = open_workspace(workspace)
    return {
        name: largest_loss(outcomes_of(before[name], store), outcomes_of(after[name], store), confidence)
        for name in after
    }


@task(name="reference-logits", **OVER_NETWORK)
def compute_reference_logits(
    folder: str, sha256: str, calibration: StepResult, device: Device, workspace: str
) -> StepResult:
    """Store the full-precision model's logits at the assistant's tokens of the held-out samples."""
    store = open_workspace(workspace)
    inputs = {"checkpoint": sha256, "samples": calibration.record.figures["sha256"]}
    identity = step_identity(LOGITS_STAGE, DIVERGENCE_VERSION, inputs, None, exact=False, device=device.kind)

    def compute(place: Path) -> Figures:
        with _asked(folder, sha256, calibration, device, store) as (model, processor, samples):
            reference_logits(model, processor, samples, place / LOGITS_FILE)
        return {}

    done = do_step(store, identity, compute)
    advance(DIVERGENCE_STAGE)
    return done


@task(name="divergence", **OVER_NETWORK)
def measure_divergence(
    folder: str,
    sha256: str,
    calibration: StepResult,
    logits: StepResult,
    device: Device,
    workspace: str,
    pruning: PruningSettings | None = None,
) -> StepResult:
    """Measure ``figures["kl"]``, the packed model's mean KL divergence from full precision in nats per token.

    Also that of short and of long replies alone, ``kl_short_replies`` and ``kl_long_replies``; a step that an earlier
    version recorded has them not.

    On the held-out samples, which neither calibration nor tuning has seen; `pruning` is of the packed model.
    """
    store = open_workspace(workspace)
    reference = logits.record.outputs[LOGITS_FILE]
    inputs = {"checkpoint": sha256, "logits": reference.sha256, "samples": calibration.record.figures["sha256"]}
    part = _if_pruned(pruning) or None
    identity = step_identity(DIVERGENCE_STAGE, DIVERGENCE_VERSION, inputs, part, exact=False, device=device.kind)

    def compute(_place: Path) -> Figures:
        asked, modules = _asked(folder, sha256, calibration, device, store), Checkpoint.open(folder).modules
        with asked as (model, processor, samples), pruned_if(model, pruning, modules):
            found = kl_divergence(model, processor, samples, store.fetch(reference))
            return {"kl": found.kl, "kl_short_replies": found.short, "kl_long_replies": found.long}

    done = do_step(store, identity, compute)
    advance(DIVERGENCE_STAGE)
    return done


def outcomes_of(done: StepResult, store: Workspace) -> pd.DataFrame:
    """Return the outcomes that an evaluation stored, one row per question."""
    return read_outcomes(store.fetch(done.record.outputs[OUTCOMES_FILE]))


def _if_pruned(pruning: PruningSettings | None) -> Figures:
    """Return what a step's recipe part has besides when tokens are dropped."""
    return {} if pruning is None else {"pruning": pruning.model_dump(mode="json")}


@contextmanager
def _asked(
    folder: str, sha256: str, calibration: StepResult, device: Device, store: Workspace
) -> Iterator[tuple[PreTrainedModel, ProcessorMixin, list[CalibrationSample]]]:
    """Yield model, processor and the held-out samples."""
    with store.scratch() as place:
        samples = load_held_out(store.fetch_folder(calibration.record.outputs, place))
        yield *loaded_model(folder, sha256, device), samples


_held: HeldModel[tuple[PreTrainedModel, ProcessorMixin]] = HeldModel()


def loaded_model(folder: str, sha256: str, device: Device) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Return the model of a folder, held with the GPU slot until another is loaded or `forget_models`.

    Raises `InputError` if its files are not those of `sha256`.
    """

    def load(stack: ExitStack) -> tuple[PreTrainedModel, ProcessorMixin]:
        stack.enter_context(gpu_slot(device))
        model = load_model(folder, device.place)
        # What is recorded under this digest must have been measured on these bytes.
        if (found := Checkpoint.open(folder).digest()) != sha256:
            raise InputError(
                f"checkpoint {folder}: other files than were to be evaluated (sha256 {found}, "
                f"expected {sha256}); do not change the folder while it is evaluated"
            )
        return model

    return _held.get((folder, sha256, device), load)


def forget_models() -> None:
    """Let go of the model that is held between the tasks of a run, and of the GPU with it."""
    _held.clear()


@contextmanager
def models_let_go() -> Iterator[None]:
    """Hold no model after this block."""
    try:
        yield
    finally:
        forget_models()
