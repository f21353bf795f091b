"""Packed weights: one shard a layer, made from the weight and its plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import task

from bivlm.checkpoint import Checkpoint
from bivlm.compression import pack_layer
from bivlm.identity import step_key
from bivlm.methods import LayerPlan
from bivlm.workspace import Reference
from tasks import grouping
from tasks.layers import Layer
from tasks.policy import OVER_NETWORK
from tasks.progress import advance
from tasks.steps import Done, do_step, open_workspace

STAGE = "pack"
FILE = "weight.packed"


@task(name="pack", task_run_name="pack-{chunk[0].name}", **OVER_NETWORK)
def pack_layers(chunk: list[Layer], workspace: str) -> dict[str, Done]:
    """The packed weights of a chunk of layers whose plans are done, one weight in memory at a time."""
    store = open_workspace(workspace)
    checkpoint = Checkpoint.open(chunk[0].folder)
    done = {}
    for layer in chunk:
        planned = layer.plan.record.outputs[grouping.FILE]
        key = step_key(
            STAGE,
            layer.method.version,
            {"checkpoint": layer.checkpoint, "tensor": layer.disk_name, "plan": planned.sha256},
            None,
            exact=True,
        )

        def pack(folder: Path, layer: Layer = layer, planned: Reference = planned) -> dict[str, Any]:
            plan = LayerPlan.model_validate_json(store.read(planned))
            packed, record = pack_layer(checkpoint.read(layer.disk_name), plan, layer.name)
            (folder / FILE).write_bytes(memoryview(packed.numpy()))
            return record.model_dump(mode="json")

        done[layer.name] = do_step(store, STAGE, key, pack)
        advance(STAGE)
    return done
