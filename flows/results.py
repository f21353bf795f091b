"""Evaluate the full-precision and the packed model on the same questions, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from bivlm.evaluation.chance import AtChance, at_chance
from bivlm.recipe.calibration import held_out_samples
from bivlm.recipe.pruning import PruningSettings
from flows.layers import side_by_side
from flows.pruning import SweepResult, sweep_all
from flows.request import Request
from flows.runners import started
from tasks import curves, evaluation
from tasks.compressed import CompressedModel
from tasks.pruning import Subject
from tasks.runtime.steps import Figures, StepResult


@dataclass(frozen=True)
class Results:
    """The results of both models: evaluations by benchmark, the loss between them, and the divergence.

    `chance` is by benchmark, in percent, None where it is unknown; `measured_on` names the samples of the divergence.
    """

    full_precision: dict[str, StepResult]
    packed: dict[str, StepResult]
    loss: dict[str, Figures]
    logits: StepResult
    divergence: StepResult
    chance: dict[str, float | None]
    measured_on: str

    def by_name(self) -> dict[str, StepResult]:
        """Return every step by what it measured, for the lineage record."""
        return {
            **{f"full precision, {benchmark}": done for benchmark, done in self.full_precision.items()},
            **{f"packed, {benchmark}": done for benchmark, done in self.packed.items()},
            "full precision, held-out samples": self.logits,
            "packed, held-out samples": self.divergence,
        }

    def figures(self) -> dict[str, Any]:
        """Return the results ready for JSON.

        Accuracy (percent) of both models and chance by benchmark, the loss on the same questions, KL (nats per token),
        also of short and long replies;
        `at_chance` are the records of `AtChance`, `measured_on` names the samples of the KL.
        """
        return {
            "full_precision": _in_short(self.full_precision),
            "packed": _in_short(self.packed),
            "loss": self.loss,
            **self.divergences(),
            "measured_on": self.measured_on,
            "chance": self.chance,
            "at_chance": [found.model_dump() for found in self.at_chance()],
        }

    def divergences(self) -> dict[str, float]:
        """Return KL over all tokens of replies, and of short and long replies alone where that was measured."""
        figures = self.divergence.record.figures
        return {name: value for name, value in figures.items() if name.startswith("kl") and value is not None}

    def at_chance(self) -> list[AtChance]:
        """Return the benchmarks on which full precision is not above chance."""
        figures = {benchmark: done.record.figures for benchmark, done in self.full_precision.items()}
        return at_chance(figures, self.chance)

    def known_chance(self) -> dict[str, float]:
        return {name: level for name, level in self.chance.items() if level is not None}


@dataclass(frozen=True)
class Measurements:
    """Everything measured of a compressed model: with benchmarks `results`, error `curves` by layer, a sweep if any."""

    results: Results | None
    curves: dict[str, StepResult]
    sweep: SweepResult | None


def measure(request: Request, model: CompressedModel, publish: Callable[[], None]) -> Measurements:
    """Evaluate both models, measure the error curves and run the recipe's sweep, as far as the request wants them."""
    results = evaluate_both(request, model, publish) if request.benchmarks else None
    found = {}
    if varied := curves.varied_layers(request.layers):  # with the recipe's settings, whatever was chosen since
        # Started again, so that no worker waited, in memory, while models were evaluated.
        with started(request.runner) as workers:
            found = side_by_side(curves.measure_curves, varied, request.store.url, publish, workers)
    sweep = sweep_both(request, model, publish) if request.sweep else None
    return Measurements(results, found, sweep)


def evaluate_both(request: Request, model: CompressedModel, publish: Callable[[], None]) -> Results:
    """Evaluate full precision (once per base model, whatever the recipe), then the packed checkpoint as it is stored.

    One after the other: each already uses all cores, or the one GPU, and a model is loaded once for its benchmarks.
    """
    at = (request.device, request.store.url)
    full = (str(model.base.model.folder), model.base.sha256)
    stored = (model.checkpoint.folder, model.checkpoint.sha256)

    def ask(folder: str, sha256: str, pruning: PruningSettings | None = None) -> dict[str, StepResult]:
        done = {}
        for name in request.benchmarks:
            done[name] = evaluation.evaluate_checkpoint(folder, sha256, name, request.questions, *at, pruning)
            publish()
        return done

    with evaluation.models_let_go():
        full_precision = ask(*full)
        logits = evaluation.compute_reference_logits(*full, model.samples, *at)
        packed = ask(*stored, request.pruning)
        divergence = evaluation.measure_divergence(*stored, model.samples, logits, *at, request.pruning)
        publish()
    return Results(
        full_precision,
        packed,
        evaluation.paired_losses(full_precision, packed, request.store.url),
        logits,
        divergence,
        {name: benchmark.chance() for name, benchmark in request.benchmarks.items()},
        held_out_samples(request.recipe.canonical()["calibration"]),
    )


def sweep_both(request: Request, model: CompressedModel, publish: Callable[[], None]) -> SweepResult:
    """Evaluate both models in every cell of the recipe's sweep."""
    base, sweep = request.base, request.sweep
    subjects = [
        Subject("full precision", str(base.model.folder), base.sha256, base.modules),
        Subject(request.recipe.name, model.checkpoint.folder, model.checkpoint.sha256),
    ]
    limit = sweep.questions if sweep.questions is not None else request.questions
    names, workspace = list(request.benchmarks), request.store.url
    return sweep_all(subjects, sweep, names, limit, request.device, workspace, publish)


def _in_short(evaluations: Mapping[str, StepResult]) -> dict[str, Figures]:
    keys = ("n", "metrics", "ci95", "intervals")
    return {
        benchmark: {key: value for key, value in done.record.figures.items() if key in keys} | {"reused": done.reused}
        for benchmark, done in evaluations.items()
    }
