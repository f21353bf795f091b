"""Choose settings by the outputs of blocks: one step says which blocks are searched together, then a step per group.

A group's step holds the settings of its layers. Where blocks take in the outputs of quantized blocks, it also holds the
outputs of its units with these settings, which the next group takes in, so that a killed search resumes at its group.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from prefect import task

from bivlm.calibration.blocks.encoded import SampleTensors, outputs_at, write_samples
from bivlm.calibration.blocks.units import Unit
from bivlm.compression.block_search import (
    activation_entropy,
    as_stored,
    dependencies,
    joint_groups,
    mean_dependency,
    search_group,
)
from bivlm.methods.base import MethodSettings
from bivlm.numerics.weight_statistics import LayerStatistics
from bivlm.recipe.search import SearchSettings
from bivlm.reports.lineage import SEARCH_STAGE
from bivlm.workspace.steps import Reference, Workspace
from tasks import block_inputs
from tasks.block_inputs import Calibration
from tasks.layers import Layer
from tasks.runtime.device import gpu_slot
from tasks.runtime.policy import OVER_NETWORK
from tasks.runtime.progress import advance
from tasks.runtime.steps import Figures, StepResult, do_step, open_workspace

STAGE = SEARCH_STAGE
GROUPS_STAGE = "joint blocks"
VERSION = 1


def with_widest_tail(layers: Sequence[Layer], settings: SearchSettings) -> list[Layer]:
    """Return the layers as they are measured: the same statistics have to serve every candidate."""

    def widest(layer: Layer) -> dict[str, Any]:
        return max(settings.offered(layer.method_settings), key=layer.method.tail_share).model_dump(mode="json")

    return [replace(layer, settings=widest(layer)) for layer in layers]


@task(name="joint-blocks", **OVER_NETWORK)
def form_groups(
    calibration: Calibration, units: list[Unit], whole: dict[str, StepResult], settings: SearchSettings
) -> tuple[list[list[Unit]], StepResult]:
    """Return the units in groups that are searched together, and the step that says so.

    `whole` are the steps that ran every unit in full precision, by name. ``figures["entropy"]`` is by unit, in nats.
    """
    store = open_workspace(calibration.workspace)
    outputs = {unit.name: _outputs(whole, unit) for unit in units}
    inputs = {"outputs": {name: reference.sha256 for name, reference in outputs.items()}}
    part = {"version": VERSION, "depth": settings.depth, "samples": settings.samples}

    def form(_place: Path) -> Figures:
        entropy = {name: activation_entropy(_seen(store, each, settings)) for name, each in outputs.items()}
        between = dependencies(units, entropy)
        threshold = mean_dependency(between)
        groups = joint_groups(units, between, threshold, settings.depth)
        names = [[unit.name for unit in group] for group in groups]
        return {"entropy": entropy, "threshold": threshold, "groups": names}

    done = do_step(store, calibration.identity(GROUPS_STAGE, inputs, part), form)
    by_name = {unit.name: unit for unit in units}
    return [[by_name[name] for name in group] for group in done.record.figures["groups"]], done


@task(name="block-search", task_run_name="block-search-{units[0].name}", **OVER_NETWORK)
def search_blocks(
    calibration: Calibration,
    units: list[Unit],
    layers: list[Layer],
    before: dict[str, StepResult],
    settings: SearchSettings,
) -> StepResult:
    """Choose the settings of `layers`, which are those of a group of units and have statistics, by the group's output.

    `before` are the steps whose outputs the group takes in, by unit. ``figures["settings"]`` has the settings by layer;
    ``["error_before"]``, ``["error_after"]`` and ``["tried"]`` are those of `bivlm.compression.block_search.Found`.
    """
    store = open_workspace(calibration.workspace)
    in_turn = calibration.settings.inputs == "quantized"
    with block_inputs.held_model(calibration.base, calibration.device) as model:
        inside = {unit.name for unit in units}
        others = [other for unit in units for other in model.predecessors(unit) if other.name not in inside]
    given = {other.name: _outputs(before, other) for other in others}
    offered = {layer.name: settings.offered(layer.method_settings) for layer in layers}
    inputs = {
        "before": {name: reference.sha256 for name, reference in given.items()},
        "layers": {
            each.name: {"weight": each.weight_sha256, "statistics": each.statistics_file.sha256} for each in layers
        },
    }
    part = {
        "version": VERSION,
        "methods": {layer.method.name: layer.method.version for layer in layers},
        "units": [unit.name for unit in units],
        "settings": {layer.component: layer.settings for layer in layers},
        **settings.model_dump(mode="json", exclude={"depth"}),  # all it decides is which units these are
        "inputs": calibration.settings.inputs,
    }

    def choose(place: Path) -> Figures:
        with gpu_slot(calibration.device), block_inputs.held_model(calibration.base, calibration.device) as model:
            samples = _first(calibration.open_samples(store), settings)
            taken = {name: _first(SampleTensors(store.fetch(each)), settings) for name, each in given.items()}
            counts = {name: len(some) for name, some in offered.items()}
            rebuild = _Rebuilding(store, layers, offered)
            found = search_group(model, units, samples, taken, counts, rebuild, settings.rounds)
        if in_turn:
            for name, outputs in found.outputs.items():
                write_samples(outputs, place / _file(name))
        return {
            "units": [unit.name for unit in units],
            "settings": {name: offered[name][which].model_dump(mode="json") for name, which in found.chosen.items()},
            "error_before": found.error_before,
            "error_after": found.error_after,
            "tried": found.tried,
            "samples": len(samples),
        }

    done = do_step(store, calibration.identity(STAGE, inputs, part), choose)
    advance(STAGE)
    return done


class _Rebuilding:
    """``rebuild(layer, candidate)`` for `search_group`, with one layer's weight and statistics in memory."""

    def __init__(
        self, store: Workspace, layers: Sequence[Layer], offered: Mapping[str, Sequence[MethodSettings]]
    ) -> None:
        self._store, self._offered = store, offered
        self._layers = {layer.name: layer for layer in layers}
        self._name = ""
        self._held: tuple[torch.Tensor, LayerStatistics] | None = None

    def __call__(self, name: str, candidate: int) -> torch.Tensor:
        if self._name != name:
            layer, self._held = self._layers[name], None
            self._held = layer.read_weight(), LayerStatistics.load(self._store.fetch(layer.statistics_file))
            self._name = name
        return as_stored(*self._held, self._offered[name][candidate], name)


def _file(unit: str) -> str:
    return f"{unit}.safetensors"


def _outputs(steps: Mapping[str, StepResult], unit: Unit) -> Reference:
    """Return the outputs of a unit: a block's own step has one file, a group's has one per unit."""
    outputs = steps[unit.name].record.outputs
    return outputs.get(_file(unit.name)) or outputs[block_inputs.OUTPUT_FILE]


def _first(tensors: SampleTensors, settings: SearchSettings) -> list[dict[str, torch.Tensor]]:
    return [tensors[number] for number in range(min(settings.samples, len(tensors)))]


def _seen(store: Workspace, outputs: Reference, settings: SearchSettings) -> list[torch.Tensor]:
    """Return a unit's activations for the first samples, without those for which it did not run."""
    first = _first(SampleTensors(store.fetch(outputs)), settings)
    found = (outputs_at({"y": first}, number) for number in range(len(first)))
    return [each["y"] for each in found if each]
