"""A linear layer on its way through the stages: what tasks know of it, its chunks, and how a chunk is done."""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from more_itertools import constrained_batches

from bivlm.checkpoint.linears import Linear
from bivlm.checkpoint.reading import Checkpoint
from bivlm.errors import InputError
from bivlm.methods import method
from bivlm.methods.base import Method, MethodSettings, Need
from bivlm.recipe.loading import Recipe
from bivlm.workspace.hashing import step_identity
from bivlm.workspace.steps import Reference, Workspace
from tasks.runtime.progress import advance
from tasks.runtime.steps import Figures, Identity, StepResult, do_step, open_workspace

# About ten seconds of the slowest stage on two cores. Smaller chunks would pay more for scheduling than they gain.
CHUNK_WEIGHTS = 1 << 28
# Below this a chunk takes a tenth of a second, so that splitting it further for the sake of more workers is no use.
SMALLEST_CHUNK_WEIGHTS = 1 << 20
STATISTICS_FILE = "statistics.safetensors"


@dataclass(frozen=True)
class Layer:
    """One linear layer on its way through the stages.

    Attributes:
        folder: the base checkpoint, on this machine and on every worker's.
        name, disk_name, component, shape: as in `bivlm.checkpoint.linears.Linear`.
        weight_sha256: of the weight, as in `bivlm.checkpoint.reading.Digests`. It keys what depends on the weight
            alone, so that a new revision of the model recomputes only the layers whose weights changed.
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
    def statistics_file(self) -> Reference:
        return self.statistics.record.outputs[STATISTICS_FILE]

    @property
    def inputs(self) -> Reference | None:
        """The file with the input statistics of the layer's site."""
        if self.block is None:
            return None
        figures = self.block.record.figures
        return self.block.record.outputs[figures["sites"][figures["site_of"][self.name]]["file"]]

    @property
    def gradient_squares(self) -> Reference | None:
        """The file with the squared gradients of the layer's weights; None if nothing of it reaches the answer."""
        return self._gradient_file("squares") if "gradients" in self.needs else None

    @property
    def gradient_moments(self) -> Reference | None:
        """The file with the second moment of the gradients of the layer's outputs; None as above."""
        return self._gradient_file("moments") if "moments" in self.needs else None

    def _gradient_file(self, kind: str) -> Reference | None:
        if self.gradients is None:
            return None
        record = self.gradients.record
        return record.outputs.get(record.figures[kind].get(self.name, ""))

    @property
    def needs(self) -> frozenset[Need]:
        return self.method.needs(self.method_settings)

    @property
    def feeds_back(self) -> bool:
        """Whether errors of the layer's weights are fed into others of them."""
        return self.method.feeds_back(self.method_settings)

    @property
    def method_settings(self) -> MethodSettings:
        return self.method.Settings.model_validate(self.settings)

    def read_weight(self, base: Checkpoint | None = None) -> torch.Tensor:
        """Return the weight, from the base checkpoint if that is open already; the bytes are checked."""
        return (base or Checkpoint.open(self.folder)).read(self.disk_name, self.weight_sha256)


def layers_of(linears: Sequence[Linear], recipe: Recipe, folder: str, tensors: Mapping[str, str]) -> list[Layer]:
    """Return the layers that the recipe compresses, in the order of `linears`; `tensors` has the weights' digests."""
    settings = recipe.canonical()["components"]
    return [
        Layer(
            folder,
            each.name,
            each.disk_name,
            each.component,
            each.shape,
            tensors[each.disk_name],
            settings[each.component],
        )
        for each in linears
    ]


def with_steps(layers: Sequence[Layer], **steps: Mapping[str, StepResult]) -> list[Layer]:
    """Return the layers with the steps of a stage: ``with_steps(layers, plan=planned)``."""
    return [replace(layer, **{stage: done[layer.name] for stage, done in steps.items()}) for layer in layers]


def in_chunks(layers: Sequence[Layer], workers: int) -> list[list[Layer]]:
    """Return neighbouring layers together, up to about ten seconds of work; a larger layer is a chunk of its own.

    Small models are split further, so that every worker has something to do.
    """
    total = sum(layer.weights for layer in layers)
    limit = max(min(CHUNK_WEIGHTS, -(-total // workers)), SMALLEST_CHUNK_WEIGHTS)
    return [
        list(chunk) for chunk in constrained_batches(layers, limit, get_len=lambda layer: layer.weights, strict=False)
    ]


def identify_by_statistics(stage: str, layer: Layer) -> Identity:
    """Return the identity of a layer's step that sees its statistics and settings alone."""
    inputs = {"statistics": layer.statistics_file.sha256}
    return step_identity(stage, layer.method.version, inputs, layer.settings, exact=True)


@dataclass(frozen=True)
class Sources:
    """What the work on a layer reads: the base checkpoint, and the workspace with the stages before."""

    base: Checkpoint
    store: Workspace


def do_layers(
    chunk: Sequence[Layer],
    workspace: str,
    identify: Callable[[Layer], Identity],
    work: Callable[[Layer, Sources, Path], Figures],
) -> dict[str, StepResult]:
    """Do one stage of a chunk of layers, one after the other; returns steps by layer name.

    ``identify(layer)`` is the step's identity, ``work(layer, sources, folder)`` what `do_step` runs if it is not done.
    Raises `InputError` if this worker does not have the base checkpoint.
    """
    sources, done = Sources(_open_base(chunk[0].folder), open_workspace(workspace)), {}
    for layer in chunk:
        step = done[layer.name] = do_step(sources.store, identify(layer), partial(work, layer, sources))
        advance(step.record.stage)
    return done


def _open_base(folder: str) -> Checkpoint:
    if not Path(folder).is_dir():
        raise InputError(
            f"base checkpoint {folder}: no such folder on {socket.gethostname()}; every worker reads the weights from "
            "there: share it, or copy it to the same path"
        )
    return Checkpoint.open(folder)
