"""Measure a model that a peer made as the leaderboard measures ours: accuracy, KL and the error of its linears."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from math import fsum
from pathlib import Path

from benchmarks.peers.exchange import write_samples
from bivlm.calibration.frozen import freeze_samples, load_held_out, load_samples
from bivlm.checkpoint.linears import Linear, linears
from bivlm.checkpoint.reading import WEIGHTS, Checkpoint
from bivlm.checkpoint.writing import check_loads
from bivlm.evaluation.benchmark import load_benchmark
from bivlm.evaluation.divergence import kl_divergence, reference_logits
from bivlm.evaluation.generation import load_model
from bivlm.evaluation.outcomes import evaluate
from bivlm.recipe.loading import Recipe
from bivlm.recipe.selection import select
from bivlm.reports.leaderboard.entries import Accuracy
from bivlm.sources.replies import read_reply
from bivlm.sources.samples import CalibrationSample


@dataclass(frozen=True)
class Measured:
    """Accuracy by benchmark, KL in nats per token, and ``||W - W_rebuilt||^2 / ||W||^2`` of the linears."""

    accuracy: dict[str, Accuracy]
    kl: float
    error: float


class Bench:
    """The base checkpoint with everything that the models made of it are measured by."""

    def __init__(self, base: Path, recipe: Recipe, questions: int, folder: Path) -> None:
        """Draw the recipe's samples into `folder`, and write the base's logits on the held-out ones."""
        self.base = Checkpoint.open(base)
        self.linears: Sequence[Linear] = select(linears(self.base), recipe)[0]
        self.samples = folder / "samples.safetensors"
        self._tasks, self._questions = recipe.evaluation, questions
        frozen = folder / "samples"
        if not frozen.is_dir():
            freeze_samples(recipe.calibration, frozen)
        self._held_out: list[CalibrationSample] = load_held_out(frozen)
        model, processor = load_model(base, "cpu")
        write_samples([dict(read_reply(model, processor, each).inputs) for each in load_samples(frozen)], self.samples)
        self._logits = reference_logits(model, processor, self._held_out, folder / "logits.safetensors")

    def accuracy(self, folder: Path) -> dict[str, Accuracy]:
        """Return the accuracy of a checkpoint by benchmark."""
        model, processor = load_model(folder, "cpu")
        found = {}
        for task in self._tasks:
            result = evaluate(model, processor, load_benchmark(task, self._questions))
            found[task] = Accuracy(n=result.n, accuracy=result.metrics["accuracy"], ci95=tuple(result.ci95))
        return found

    def measure(self, weights: Path, folder: Path) -> Measured:
        """Measure the dense `weights` in the place of the base's, as the checkpoint `folder`.

        Raises `InputError` if a tensor is missing or of another shape.
        """
        made = self._checkpoint(weights, folder)
        model, processor = load_model(folder, "cpu")
        kl = kl_divergence(model, processor, self._held_out, self._logits)
        return Measured(self.accuracy(folder), kl, self._error(made))

    def _checkpoint(self, weights: Path, folder: Path) -> Checkpoint:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.base.folder, folder)
        shutil.copy(weights, folder / WEIGHTS)
        check_loads(self.base, folder)
        return Checkpoint.open(folder)

    def _error(self, made: Checkpoint) -> float:
        lost, total = [], []
        for linear in self.linears:
            before = self.base.read(linear.disk_name).double()
            after = made.read(linear.disk_name).to(linear.dtype).double()
            lost.append(float((before - after).square().sum()))
            total.append(float(before.square().sum()))
        return fsum(lost) / fsum(total)
