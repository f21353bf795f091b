"""What a task needs to know of a layer, how layers are put into chunks, and how a chunk is done."""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from more_itertools import constrained_batches

from bivlm.checkpoint.linears import Linear
from bivlm.checkpoint.reading import Checkpoint
from bivlm.errors import InputError
from bivlm.methods import method
from bivlm.methods.base import Method, MethodSettings, Need
from bivlm.recipe.loading import Recipe
from bivlm.workspace.steps import Reference
from tasks.runtime.progress import advance
from tasks.runtime.steps import StepResult, do_step, open_workspace

# About ten seconds of the slowest stage on two cores. Smaller chunks would pay more for scheduling than they gain.
CHUNK_WEIGHTS = 1 << 28
# Below this a chunk takes a tenth of a second, so that splitting it further for the sake of more workers is no use.
SMALLEST_CHUNK_WEIGHTS = 1 << 20


@dataclass(frozen=True)
class Layer:
    """One linear layer on its way through the stages.

    Attributes:
        folder: where the base checkpoint lies, on this machine and on every worker's.
        name, disk_name, component, shape: as in `bivlm.checkpoint.Linear`.
        weight_sha256: of the weight, as in `bivlm.checkpoint.Digests`. The key of what is made of the weight alone, so
            that a new revision of the model is computed anew only where its weights are new.
        settings: what the recipe says about the layer, ready for JSON.
        statistics, plan: the steps of the stages before, once they are done.
        block: the step that ran the layer's block on the calibration samples, for a method that needs inputs.
        gradients: the step of the answer's gradients, for a method that needs them.
    """

    folder: str
    name: str
    disk_name: str
    component: str
    shape: tuple[int, int]
    weight_sha256: str
    settings: dict[str, Any]
    statistics: StepResult | None = None
    plan: StepResult | None = None
    block: StepResult | None = None
    gradients: StepResult | None = None

    @property
    def weights(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def method(self) -> Method:
        return method(self.settings["method"])

    @property
    def inputs(self) -> Reference | None:
        """The file with the input statistics of the layer's site."""
        if self.block is None:
            return None
        figures = self.block.record.figures
        return self.block.record.outputs[figures["sites"][figures["site_of"][self.name]]["file"]]

    @property
    def gradient_squares(self) -> Reference | None:
        """The file with the squared gradients of the layer's weights; none where nothing of it reaches the answer."""
        if self.gradients is None:
            return None
        record = self.gradients.record
        return record.outputs.get(record.figures["squares"].get(self.name, ""))

    @property
    def needs(self) -> frozenset[Need]:
        """What the layer's method has to see."""
        return self.method.needs(self.method_settings)

    @property
    def method_settings(self) -> MethodSettings:
        return self.method.Settings.model_validate(self.settings)


def layers_of(linears: Sequence[Linear], recipe: Recipe, folder: str, tensors: Mapping[str, str]) -> list[Layer]:
    """The layers that the recipe compresses, in the order of `linears`; `tensors` are the digests of the weights."""
    settings = recipe.canonical()["components"]
    return [
        Layer(
            folder,
            linear.name,
            linear.disk_name,
            linear.component,
            linear.shape,
            tensors[linear.disk_name],
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
    return [
        list(chunk) for chunk in constrained_batches(layers, limit, get_len=lambda layer: layer.weights, strict=False)
    ]


def open_base(chunk: Sequence[Layer]) -> Checkpoint:
    """The base checkpoint of a chunk of layers; raises `InputError` if this worker does not have it."""
    folder = chunk[0].folder
    if not Path(folder).is_dir():
        raise InputError(
            f"base checkpoint {folder}: no such folder on {socket.gethostname()}; every worker reads the weights from "
            "there: share it, or copy it to the same path"
        )
    return Checkpoint.open(folder)


def do_layers(
    chunk: Sequence[Layer],
    workspace: str,
    identity: Callable[[Layer], dict[str, Any]],
    work: Callable[[Layer, Path], dict[str, Any]],
) -> dict[str, StepResult]:
    """One step a layer, one after the other; steps by layer name.

    ``identity(layer)`` is the step's identity, ``work(layer, folder)`` what `do_step` runs if it is not done yet.
    """
    store = open_workspace(workspace)
    done = {}
    for layer in chunk:
        step = done[layer.name] = do_step(store, identity(layer), partial(work, layer))
        advance(step.record.stage)
    return done
