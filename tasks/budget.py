"""Bits across layers: choose the settings of each layer under the recipe's budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from prefect import task

from bivlm.compression.budget import Choices, allocate, importance
from bivlm.methods.base import CurvePoint
from bivlm.numerics.weight_statistics import LayerStatistics
from bivlm.recipe.budget import BudgetSettings
from bivlm.reports.lineage import ALLOCATION_STAGE
from bivlm.untrusted import parse_json
from bivlm.workspace.hashing import canonical_json, step_identity
from tasks import binarization
from tasks.layers import Layer, Sources, do_layers, identify_by_statistics
from tasks.runtime.policy import OVER_NETWORK
from tasks.runtime.steps import Figures, Identity, StepResult, do_step, open_workspace

STAGE = "choices"
SENSITIVITY_STAGE = "sensitivity"
FILE = "points.json"
VERSION = 1


@task(name="choices", task_run_name="choices-{chunk[0].name}", **OVER_NETWORK)
def measure_choices(chunk: list[Layer], workspace: str) -> dict[str, StepResult]:
    """Measure what each layer of a chunk could be given, as a file of points, without quantizing it."""
    return do_layers(chunk, workspace, partial(identify_by_statistics, STAGE), _measure)


def _measure(layer: Layer, sources: Sources, folder: Path) -> Figures:
    statistics = LayerStatistics.load(sources.store.fetch(layer.statistics_file))
    points = layer.method.curve(statistics, layer.method_settings)
    (folder / FILE).write_bytes(canonical_json([vars(point) for point in points]))
    return {"points": len(points)}


@task(name="sensitivity", task_run_name="sensitivity-{chunk[0].name}", **OVER_NETWORK)
def measure_sensitivities(chunk: list[Layer], workspace: str) -> dict[str, StepResult]:
    """Measure what the error feedback of a chunk of layers leaves of the curvature, from inputs in full precision."""
    return do_layers(chunk, workspace, _identify_sensitivity, _measure_sensitivity)


def _identify_sensitivity(layer: Layer) -> Identity:
    inputs = {"inputs": layer.inputs.sha256, "trace": _trace(layer)}
    if layer.gradient_moments is not None:
        inputs["moments"] = layer.gradient_moments.sha256
    return step_identity(SENSITIVITY_STAGE, layer.method.version, inputs, layer.settings, exact=False)


def _measure_sensitivity(layer: Layer, sources: Sources, _folder: Path) -> Figures:
    inputs = binarization.read_inputs(layer, sources.store)
    return {"sensitivity": layer.method.sensitivity(inputs, _trace(layer), layer.method_settings)}


def _trace(layer: Layer) -> float:
    return layer.gradients.record.figures["traces"].get(layer.name, 0.0)


@task(name="allocate", **OVER_NETWORK)
def allocate_bits(
    layers: Sequence[Layer],
    choices: Mapping[str, StepResult],
    budget: BudgetSettings,
    curvature: Mapping[str, float] | None,
    workspace: str,
) -> tuple[list[Layer], StepResult]:
    """Return the layers with the settings that the budget gives them, and the step that says so.

    `curvature` is, by layer, how much the divergence rises with its weights' mean squared error, for a budget that
    needs it. ``figures["settings"]`` holds what the lineage record needs to check the plans.
    """
    store = open_workspace(workspace)
    files = {name: done.record.outputs[FILE] for name, done in choices.items()}
    offered = {
        layer.name: Choices(
            layer.weights,
            _importance(layer, curvature),
            [CurvePoint(**point) for point in parse_json(store.read(files[layer.name]), f"{FILE} of {layer.name}")],
        )
        for layer in layers
    }
    inputs = {
        "choices": {name: reference.sha256 for name, reference in files.items()},
        "importance": {name: each.importance for name, each in offered.items()},
    }
    identity = step_identity(ALLOCATION_STAGE, VERSION, inputs, budget.model_dump(mode="json"), exact=True)

    def choose(_place: Path) -> Figures:
        return {
            "settings": {name: point.settings for name, point in allocate(offered, budget.bits, budget.least).items()}
        }

    done = do_step(store, identity, choose)
    settings = done.record.figures["settings"]
    return [replace(layer, settings=settings[layer.name]) for layer in layers], done


def _importance(layer: Layer, curvature: Mapping[str, float] | None) -> float:
    """Return what a relative squared error of 1 in this layer costs, see `bivlm.recipe.budget.BudgetSettings`."""
    figures = layer.statistics.record.figures
    factor = layer.weights if curvature is None else curvature.get(layer.name, 0.0)
    return importance(figures["mean"], figures["std"], factor)
