"""What the full-precision and the packed model can do: both are asked the same, one after the other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bivlm.evaluation.chance import AtChance, at_chance
from bivlm.recipe.calibration import held_out_samples
from bivlm.recipe.pruning import PruningSettings
from flows.pruning import SweepResult, sweep_all
from tasks import checkpoint, evaluation, pruning
from tasks.runtime.steps import StepResult

if TYPE_CHECKING:
    from flows.request import Request


@dataclass(frozen=True)
class Results:
    """What both models can do: evaluations by benchmark, the loss between them, and the divergence.

    `chance` is by benchmark, in percent, None where it is unknown; `measured_on` says what the divergence is measured
    on.
    """

    full_precision: dict[str, StepResult]
    packed: dict[str, StepResult]
    loss: dict[str, dict[str, Any]]
    logits: StepResult
    divergence: StepResult
    chance: dict[str, float | None]
    measured_on: str

    def by_name(self) -> dict[str, StepResult]:
        """Every step by what it measured, for the lineage record."""
        return {
            **{f"full precision, {benchmark}": done for benchmark, done in self.full_precision.items()},
            **{f"packed, {benchmark}": done for benchmark, done in self.packed.items()},
            "full precision, held-out samples": self.logits,
            "packed, held-out samples": self.divergence,
        }

    def figures(self) -> dict[str, Any]:
        """Accuracy (percent) of both models and chance by benchmark, the loss on the same questions, KL (nats a token).

        `at_chance` are the records of `AtChance`, `measured_on` names the samples of the KL.
        """
        keys = ("n", "metrics", "ci95", "intervals")

        def short(evaluations: dict[str, StepResult]) -> dict[str, Any]:
            return {
                benchmark: {key: value for key, value in done.record.figures.items() if key in keys}
                | {"reused": done.reused}
                for benchmark, done in evaluations.items()
            }

        return {
            "full_precision": short(self.full_precision),
            "packed": short(self.packed),
            "loss": self.loss,
            "kl": self.divergence.record.figures["kl"],
            "measured_on": self.measured_on,
            "chance": self.chance,
            "at_chance": [found.model_dump() for found in self.at_chance()],
        }

    def at_chance(self) -> list[AtChance]:
        """The benchmarks on which full precision is not above chance."""
        figures = {benchmark: done.record.figures for benchmark, done in self.full_precision.items()}
        return at_chance(figures, self.chance)


def evaluate_both(
    request: Request, packed: checkpoint.PackedCheckpoint, samples: StepResult, publish: Callable[[], None]
) -> Results:
    """Full precision first (once per base model, whatever the recipe), then the packed checkpoint as it is stored.

    One after the other: each already uses all cores, or the one GPU, and a model is loaded once for its benchmarks.
    """
    base, device, workspace = request.base, request.device, request.store.url

    pruning = request.recipe.pruning.setting if request.recipe.pruning else None

    def ask(folder: str, sha256: str, pruning: PruningSettings | None = None) -> dict[str, StepResult]:
        done = {}
        for name in request.benchmarks:
            done[name] = evaluation.evaluate_checkpoint(
                folder, sha256, name, request.questions, device, workspace, pruning
            )
            publish()
        return done

    folder = str(base.model.folder)
    try:
        full_precision = ask(folder, base.sha256)
        logits = evaluation.compute_reference_logits(folder, base.sha256, samples, device, workspace)
        asked = ask(packed.folder, packed.sha256, pruning)
        divergence = evaluation.measure_divergence(
            packed.folder, packed.sha256, samples, logits, device, workspace, pruning
        )
        publish()
    finally:
        evaluation.forget_models()
    loss = evaluation.paired_losses(full_precision, asked, workspace)
    chance = {name: benchmark.chance() for name, benchmark in request.benchmarks.items()}
    measured_on = held_out_samples(request.recipe.canonical()["calibration"])
    return Results(full_precision, asked, loss, logits, divergence, chance, measured_on)


def sweep_both(request: Request, packed: checkpoint.PackedCheckpoint, publish: Callable[[], None]) -> SweepResult:
    """Ask both models in every cell of the recipe's sweep."""
    base, sweep = request.base, request.recipe.pruning.sweep
    subjects = [
        pruning.Subject("full precision", str(base.model.folder), base.sha256, base.modules),
        pruning.Subject(request.recipe.name, packed.folder, packed.sha256),
    ]
    limit = sweep.questions if sweep.questions is not None else request.questions
    names, workspace = list(request.benchmarks), request.store.url
    return sweep_all(subjects, sweep, names, limit, request.device, workspace, publish)
