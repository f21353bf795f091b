"""Plans: how every layer will be quantized, decided from its statistics alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import task

from bivlm.numerics.weight_statistics import LayerStatistics
from bivlm.workspace.hashing import canonical_json, step_identity
from bivlm.workspace.steps import Reference
from tasks import saliency
from tasks.layers import Layer, do_layers
from tasks.runtime.policy import OVER_NETWORK
from tasks.runtime.steps import StepResult, open_workspace

STAGE = "plan"
FILE = "plan.json"


@task(name="plan", task_run_name="plan-{chunk[0].name}", **OVER_NETWORK)
def plan_layers(chunk: list[Layer], workspace: str) -> dict[str, StepResult]:
    """The plans of a chunk of layers whose statistics are done; steps by layer name."""
    store = open_workspace(workspace)

    def identity(layer: Layer) -> dict[str, Any]:
        inputs = {"statistics": _measured(layer).sha256}
        return step_identity(STAGE, layer.method.version, inputs, layer.settings, exact=True)

    def plan(layer: Layer, folder: Path) -> dict[str, Any]:
        chosen = layer.method.plan(LayerStatistics.load(store.fetch(_measured(layer))), layer.method_settings)
        (folder / FILE).write_bytes(canonical_json(chosen.model_dump(mode="json")))
        return layer.method.describe(chosen)

    return do_layers(chunk, workspace, identity, plan)


def _measured(layer: Layer) -> Reference:
    return layer.statistics.record.outputs[saliency.FILE]
