"""Plans: decide how every layer will be quantized, from its statistics alone."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from prefect import task

from bivlm.numerics.weight_statistics import LayerStatistics
from bivlm.workspace.hashing import canonical_json
from tasks.layers import Layer, Sources, do_layers, identify_by_statistics
from tasks.runtime.policy import OVER_NETWORK
from tasks.runtime.steps import Figures, StepResult

STAGE = "plan"
FILE = "plan.json"


@task(name="plan", task_run_name="plan-{chunk[0].name}", **OVER_NETWORK)
def plan_layers(chunk: list[Layer], workspace: str) -> dict[str, StepResult]:
    """Plan a chunk of layers whose statistics are done; steps by layer name."""
    return do_layers(chunk, workspace, partial(identify_by_statistics, STAGE), _plan)


def _plan(layer: Layer, sources: Sources, folder: Path) -> Figures:
    statistics = LayerStatistics.load(sources.store.fetch(layer.statistics_file))
    plan = layer.method.plan(statistics, layer.method_settings)
    (folder / FILE).write_bytes(canonical_json(plan.model_dump(mode="json")))
    return layer.method.describe(plan)
