"""How a layer's error falls with the largest salient share that is allowed: the paper's figures 7 and 8."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from prefect import task

from bivlm.numerics.weight_statistics import LayerStatistics
from bivlm.workspace.hashing import step_identity
from tasks.layers import Layer, do_layers, open_base
from tasks.runtime.policy import OVER_NETWORK
from tasks.runtime.steps import StepResult

STAGE = "error curve"
P_MAX = (0.01, 0.02, 0.05, 0.10)
LAYER_WEIGHTS = 1 << 22  # of a layer that are looked at, in rows at even distances
MODEL_WEIGHTS = 1 << 27  # of a model, about


def varied_layers(layers: Sequence[Layer]) -> list[Layer]:
    """Those whose method has a largest salient share to vary; of a large model's every so manieth of each kind.

    Kinds are names without the numbers of their blocks. A picture needs no more, and all would take as long as the
    compression itself.
    """
    varied = [layer for layer in layers if "p_max" in layer.method.Settings.model_fields]
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
    """``figures["error_by_p_max"]`` of a chunk of `varied_layers`: the plan's error at each of `P_MAX`.

    The statistics are measured again with the largest share, because those of the recipe keep fewer of the large
    weights; they are not stored. A large layer's are measured on some of its rows.
    """
    checkpoint = open_base(chunk)

    def identity(layer: Layer) -> dict[str, Any]:
        inputs = {"weight": layer.weight_sha256}
        settings = {key: value for key, value in layer.settings.items() if key != "p_max"} | {"p_max": list(P_MAX)}
        settings |= {"rows": _rows(layer)}
        return step_identity(STAGE, layer.method.version, inputs, settings, exact=True)

    def measure(layer: Layer, _folder: Path) -> dict[str, Any]:
        rows = torch.arange(_rows(layer)) * layer.shape[0] // _rows(layer)
        weight = checkpoint.read(layer.disk_name, layer.weight_sha256)[rows]
        statistics = LayerStatistics.measure(weight, max(P_MAX), layer.name)
        errors = {}
        for p_max in P_MAX:
            settings = layer.method.Settings.model_validate(layer.settings | {"p_max": p_max})
            errors[str(p_max)] = layer.method.plan(statistics, settings).parameters["predicted_error"]
        return {"error_by_p_max": errors}

    return do_layers(chunk, workspace, identity, measure)


def _rows(layer: Layer) -> int:
    return min(layer.shape[0], max(1, LAYER_WEIGHTS // layer.shape[1]))
