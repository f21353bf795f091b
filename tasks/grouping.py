"""Plans: how every layer will be quantized, decided from its statistics alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import task

from bivlm.identity import canonical_json, step_key
from bivlm.statistics import LayerStatistics
from bivlm.workspace import Reference
from tasks import saliency
from tasks.layers import Layer
from tasks.policy import OVER_NETWORK
from tasks.progress import advance
from tasks.steps import Done, do_step, open_workspace

STAGE = "plan"
FILE = "plan.json"


@task(name="plan", task_run_name="plan-{chunk[0].name}", **OVER_NETWORK)
def plan_layers(chunk: list[Layer], workspace: str) -> dict[str, Done]:
    """The plans of a chunk of layers whose statistics are done; steps by layer name."""
    store = open_workspace(workspace)
    done = {}
    for layer in chunk:
        measured = layer.statistics.record.outputs[saliency.FILE]
        key = step_key(STAGE, layer.method.version, {"statistics": measured.sha256}, layer.settings, exact=True)

        def plan(folder: Path, layer: Layer = layer, measured: Reference = measured) -> dict[str, Any]:
            chosen = layer.method.plan(LayerStatistics.load(store.fetch(measured)), layer.method_settings)
            (folder / FILE).write_bytes(canonical_json(chosen.model_dump(mode="json")))
            return layer.method.describe(chosen)

        done[layer.name] = do_step(store, STAGE, key, plan)
        advance(STAGE)
    return done
