"""What the full-precision and the packed model can do: accuracy per benchmark, and the divergence between them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from threading import Lock
from typing import Any

import pandas as pd
import torch
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
from tasks.runtime.device import Device, gpu_slot
from tasks.runtime.policy import OVER_NETWORK, smaller_after_out_of_memory
from tasks.runtime.progress import advance
from tasks.runtime.steps import StepResult, do_step, open_workspace

STAGE = "evaluation"
LOGITS_STAGE = "reference logits"
DIVERGENCE_STAGE = "divergence"
VERSION = 2  # raised when a CPU computes in another dtype, too
DIVERGENCE_VERSION = 3  # of both steps; raised when held-out samples took the place of those calibrated on
OUTCOMES_FILE = "outcomes.parquet"
LOGITS_FILE = "logits.safetensors"


@task(name="benchmark", **OVER_NETWORK)
def open_benchmark(benchmark: str, limit: int | None) -> Benchmark:
    """The benchmark, whose questions may have to be fetched from the hub; raises `InputError`."""
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
    """One checkpoint on one benchmark: figures as `Evaluation.record`, the outcomes as a parquet file.

    With `pruning` it drops tokens.
    """
    store = open_workspace(workspace)
    questions = load_benchmark(benchmark, limit)
    identity = step_identity(
        STAGE,
        VERSION,
        {"checkpoint": sha256, "benchmark": questions.digest},
        {"task": benchmark, **_if_pruned(pruning)},
        exact=False,
        device=device.kind,
    )
    shown = 0

    def ask(place: Path) -> dict[str, Any]:
        def progress(answered: int, _total: int) -> None:
            # A second attempt with smaller batches begins at the first question again; the bar does not go back.
            nonlocal shown
            if answered > shown:
                advance(STAGE, answered - shown)
                shown = answered

        model, processor = loaded_model(folder, sha256, device)
        with pruned_if(model, pruning, Checkpoint.open(folder).modules):
            result = smaller_after_out_of_memory(
                lambda size: evaluate(model, processor, questions, batch_size=size, progress=progress),
                default_batch_size(model),
            )
        write_outcomes(result.outcomes, place / OUTCOMES_FILE)
        return {**result.record(), "benchmark_sha256": questions.digest, "name": questions.name}

    done = do_step(store, identity, ask)
    advance(STAGE, len(questions) - shown)
    return done


@task(name="paired-losses", **OVER_NETWORK)
def paired_losses(
    before: dict[str, StepResult], after: dict[str, StepResult], workspace: str
) -> dict[str, dict[str, Any]]:
    """What the second model lost against the first on every benchmark, question by question: `Loss` as a dict."""
    store = open_workspace(workspace)
    return {name: asdict(loss_between(_outcomes(before[name], store), _outcomes(after[name], store))) for name in after}


@task(name="largest-losses", **OVER_NETWORK)
def largest_losses(
    before: dict[str, StepResult], after: dict[str, StepResult], confidence: float, workspace: str
) -> dict[str, LargestLoss]:
    """What the second model may have lost against the first on every benchmark, at most, with this confidence."""
    store = open_workspace(workspace)
    return {
        name: largest_loss(_outcomes(before[name], store), _outcomes(after[name], store), confidence) for name in after
    }


@task(name="reference-logits", **OVER_NETWORK)
def compute_reference_logits(
    folder: str, sha256: str, calibration: StepResult, device: Device, workspace: str
) -> StepResult:
    """What the full-precision model says at the assistant's tokens of the held-out samples."""
    store = open_workspace(workspace)
    identity = step_identity(
        LOGITS_STAGE,
        DIVERGENCE_VERSION,
        {"checkpoint": sha256, "samples": calibration.record.figures["sha256"]},
        None,
        exact=False,
        device=device.kind,
    )

    def compute(place: Path) -> dict[str, Any]:
        with _asked(folder, sha256, calibration, device, store) as (model, processor, conversations):
            reference_logits(model, processor, conversations, place / LOGITS_FILE)
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
    """`figures["kl"]`: mean KL divergence (nats a token) of the packed model from full precision.

    It is measured on the held-out samples, which neither calibration nor tuning has seen; with `pruning` the packed
    model drops tokens.
    """
    store = open_workspace(workspace)
    reference = logits.record.outputs[LOGITS_FILE]
    identity = step_identity(
        DIVERGENCE_STAGE,
        DIVERGENCE_VERSION,
        {"checkpoint": sha256, "logits": reference.sha256, "samples": calibration.record.figures["sha256"]},
        _if_pruned(pruning) or None,
        exact=False,
        device=device.kind,
    )

    def compute(_place: Path) -> dict[str, Any]:
        asked = _asked(folder, sha256, calibration, device, store)
        modules = Checkpoint.open(folder).modules
        with asked as (model, processor, conversations), pruned_if(model, pruning, modules):
            return {"kl": kl_divergence(model, processor, conversations, store.fetch(reference))}

    done = do_step(store, identity, compute)
    advance(DIVERGENCE_STAGE)
    return done


def forget_models() -> None:
    """Let go of the model that is held between the tasks of a run, and of the GPU with it."""
    with _guard:
        _held.clear()


def _outcomes(done: StepResult, store: Workspace) -> pd.DataFrame:
    return read_outcomes(store.fetch(done.record.outputs[OUTCOMES_FILE]))


def _if_pruned(pruning: PruningSettings | None) -> dict[str, Any]:
    """What the key of a step has more of when tokens are dropped."""
    return {} if pruning is None else {"pruning": pruning.model_dump(mode="json")}


@contextmanager
def _asked(
    folder: str, sha256: str, calibration: StepResult, device: Device, store: Workspace
) -> Iterator[tuple[PreTrainedModel, ProcessorMixin, list[CalibrationSample]]]:
    """Model, processor and the held-out samples."""
    with store.scratch() as samples:
        conversations = load_held_out(store.fetch_folder(calibration.record.outputs, samples))
        yield *loaded_model(folder, sha256, device), conversations


class _HeldModel:
    """At most one model, and the GPU slot for as long as it is there."""

    def __init__(self) -> None:
        self._which: tuple[str, str, Device] | None = None
        self._model: tuple[PreTrainedModel, ProcessorMixin] | None = None
        self._slot = ExitStack()

    def load(self, folder: str, sha256: str, device: Device) -> tuple[PreTrainedModel, ProcessorMixin]:
        """The model of this folder; `sha256` makes a rewritten folder another model."""
        wanted = (folder, sha256, device)
        if self._which != wanted:
            self.clear()
            with ExitStack() as slot:
                slot.enter_context(gpu_slot(device))
                model = load_model(folder, device.place)
                # What is recorded under this digest must have been measured on these bytes.
                if (found := Checkpoint.open(folder).digest()) != sha256:
                    raise InputError(
                        f"checkpoint {folder}: other files than were to be evaluated (sha256 {found}, "
                        f"expected {sha256}); do not change the folder while it is evaluated"
                    )
                self._slot = slot.pop_all()
            self._model, self._which = model, wanted
        return self._model

    def clear(self) -> None:
        """Forget the model, then let go of the GPU."""
        self._model = self._which = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self._slot.close()


# Loading takes longer than asking a few questions, so a model stays between the tasks of a run.
_held = _HeldModel()
_guard = Lock()


def loaded_model(folder: str, sha256: str, device: Device) -> tuple[PreTrainedModel, ProcessorMixin]:
    """The model of a folder, held until another is asked for or `forget_models`; raises `InputError` if it changed."""
    with _guard:
        return _held.load(folder, sha256, device)
