"""What a task needs to know of a layer, and how layers are put into chunks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bivlm.checkpoint import Linear
from bivlm.methods import Method, MethodSettings, method
from bivlm.recipe import Recipe
from tasks.steps import Done

# About ten seconds of the slowest stage on two cores. Smaller chunks would pay more for scheduling than they gain.
CHUNK_WEIGHTS = 1 << 28
# Below this a chunk takes a tenth of a second, so that splitting it further for the sake of more workers is no use.
SMALLEST_CHUNK_WEIGHTS = 1 << 20


@dataclass(frozen=True)
class Layer:
    """One linear layer on its way through the stages.

    Attributes:
        folder, checkpoint: where the base checkpoint lies on this machine, and its digest.
        name, disk_name, component, shape: as in `bivlm.checkpoint.Linear`.
        settings: what the recipe says about the layer, ready for JSON.
        statistics, plan: the steps of the stages before, once they are done.
    """

    folder: str
    checkpoint: str
    name: str
    disk_name: str
    component: str
    shape: tuple[int, int]
    settings: dict[str, Any]
    statistics: Done | None = None
    plan: Done | None = None

    @property
    def weights(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def method(self) -> Method:
        return method(self.settings["method"])

    @property
    def method_settings(self) -> MethodSettings:
        return self.method.Settings.model_validate(self.settings)


def layers_of(linears: Sequence[Linear], recipe: Recipe, folder: str, checkpoint: str) -> list[Layer]:
    """The layers that the recipe compresses, in the order of `linears`."""
    settings = recipe.canonical()["components"]
    return [
        Layer(
            folder,
            checkpoint,
            linear.name,
            linear.disk_name,
            linear.component,
            linear.shape,
            settings[linear.component],
        )
        for linear in linears
    ]


def in_chunks(layers: Sequence[Layer], workers: int) -> list[list[Layer]]:
    """Neighbouring layers together up to about ten seconds of work; a layer larger than that is a chunk of its own.

    Small models are split further, so that every worker has something to do.
    """
    total = sum(layer.weights for layer in layers)
    limit = max(min(CHUNK_WEIGHTS, -(-total // workers)), SMALLEST_CHUNK_WEIGHTS)
    chunks: list[list[Layer]] = [[]]
    filled = 0
    for layer in layers:
        if chunks[-1] and filled + layer.weights > limit:
            chunks.append([])
            filled = 0
        chunks[-1].append(layer)
        filled += layer.weights
    return chunks
