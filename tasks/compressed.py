"""A compressed model: everything that its report, its lineage record and MLflow are made from."""

from __future__ import annotations

from dataclasses import dataclass

from bivlm.recipe.loading import Recipe
from tasks.checkpoint import Base, PackedCheckpoint
from tasks.embeddings import Embedding
from tasks.layers import Layer
from tasks.runtime.steps import StepResult


@dataclass(frozen=True)
class CompressedModel:
    """A packed checkpoint with what it was made of.

    Attributes:
        base, recipe: the model, and what was done to it.
        samples: the step of the calibration samples.
        layers: with the steps that were done of them; `shards` has the step of each layer's packed bytes by name.
        embeddings: those that were packed, each with the step of its packed bytes.
        between: steps that others refer to: of calibration, and of packing before finishing.
        checkpoint: the files.
        tuned: the step of finishing, if there was one.
    """

    base: Base
    recipe: Recipe
    samples: StepResult
    layers: list[Layer]
    shards: dict[str, StepResult]
    embeddings: list[tuple[Embedding, StepResult]]
    between: list[StepResult]
    checkpoint: PackedCheckpoint
    tuned: StepResult | None = None
