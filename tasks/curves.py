"""The error of a layer by the largest salient share that is allowed: the paper's figures 7 and 8."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from prefect import task

from bivlm.numerics.weight_statistics import LayerStatistics
from bivlm.workspace.hashing import step_identity
from tasks.layers import Layer, Sources, do_layers
from tasks.runtime.policy import OVER_NETWORK
from tasks.runtime.steps import Figures, Identity, StepResult

STAGE = "error curve"
P_MAX = (0.01, 0.02, 0.05, 0.10)
LAYER_WEIGHTS = 1 << 22  # of a layer that are looked at, in rows at even distances
MODEL_WEIGHTS = 1 << 27  # of a model, about


def varied_layers(layers: Sequence[Layer]) -> list[Layer]:
    """Return the layers whose method has a largest salient share to vary; of a large model a sample of each kind.

    Kinds are names without the numbers of their blocks. A figure needs no more, and all layers would take as long as
    the compression itself. Levels at odd multiples stand without salient weights, so that there is nothing to vary.
    """
    varied = [
        layer
        for layer in layers
        if "p_max" in layer.method.Settings.model_fields and layer.settings.get("levels") != "odd"
    ]
    every = math.ceil(sum(min(layer.weights, LAYER_WEIGHTS) for layer in varied) / MODEL_WEIGHTS)
    seen: Counter[str] = Counter()
    chosen = []
    for layer in varied:
        kind = re.sub(r"\d+", "", layer.name)
        if seen[kind] % every == 0:
            chosen.append(layer)
        seen[kind] += 1
    return chosen


@task(name="error-curve", task_run_name="error-curve-{chunk[0].name}", **OVER_NETWORK)
def measure_curves(chunk: list[Layer], workspace: str) -> dict[str, StepResult]:
    """Measure ``figures["error_by_p_max"]`` of a chunk of `varied_layers`: the plan's error at each of `P_MAX`.

    The statistics are measured again with the largest share, because those of the recipe keep fewer of the large
    weights; they are not stored. Of a large layer some rows are measured.
    """
    return do_layers(chunk, workspace, _identify, _measure)


def _identify(layer: Layer) -> Identity:
    settings = {**layer.settings, "p_max": list(P_MAX), "rows": _rows(layer)}
    return step_identity(STAGE, layer.method.version, {"weight": layer.weight_sha256}, settings, exact=True)


def _measure(layer: Layer, sources: Sources, _folder: Path) -> Figures:
    rows = torch.arange(_rows(layer)) * layer.shape[0] // _rows(layer)
    statistics = LayerStatistics.measure(layer.read_weight(sources.base)[rows], max(P_MAX), layer.name)
    errors = {}
    for p_max in P_MAX:
        settings = layer.method.Settings.model_validate(layer.settings | {"p_max": p_max})
        errors[str(p_max)] = layer.method.plan(statistics, settings).parameters["predicted_error"]
    return {"error_by_p_max": errors}


def _rows(layer: Layer) -> int:
    return min(layer.shape[0], max(1, LAYER_WEIGHTS // layer.shape[1]))
