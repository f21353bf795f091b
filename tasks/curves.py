"""How a layer's error falls with the largest salient share that is allowed: the paper's figures 7 and 8."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import task

from bivlm.identity import step_identity
from bivlm.statistics import LayerStatistics
from tasks.layers import Layer, do_layers, open_base
from tasks.policy import OVER_NETWORK
from tasks.steps import Done

STAGE = "error curve"
P_MAX = (0.01, 0.02, 0.05, 0.10)


def has_curve(layer: Layer) -> bool:
    """Whether the layer's method has a largest salient share to vary."""
    return "p_max" in layer.method.Settings.model_fields


@task(name="error-curve", task_run_name="error-curve-{chunk[0].name}", **OVER_NETWORK)
def measure_curves(chunk: list[Layer], workspace: str) -> dict[str, Done]:
    """``figures["error_by_p_max"]`` of a chunk of layers that `has_curve`: the plan's error at each of `P_MAX`.

    The statistics are measured again with the largest share, because those of the recipe keep fewer of the large
    weights; they are not stored.
    """
    checkpoint = open_base(chunk)

    def identity(layer: Layer) -> dict[str, Any]:
        inputs = {"weight": layer.weight_sha256}
        settings = {key: value for key, value in layer.settings.items() if key != "p_max"} | {"p_max": list(P_MAX)}
        return step_identity(STAGE, layer.method.version, inputs, settings, exact=True)

    def measure(layer: Layer, _folder: Path) -> dict[str, Any]:
        weight = checkpoint.read(layer.disk_name, layer.weight_sha256)
        statistics = LayerStatistics.measure(weight, max(P_MAX), layer.name)
        errors = {}
        for p_max in P_MAX:
            settings = layer.method.Settings.model_validate(layer.settings | {"p_max": p_max})
            errors[str(p_max)] = layer.method.plan(statistics, settings).parameters["predicted_error"]
        return {"error_by_p_max": errors}

    return do_layers(chunk, workspace, identity, measure)
