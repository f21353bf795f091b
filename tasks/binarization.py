"""Packed weights: one shard a layer, made from the weight and its plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import task

from bivlm.checkpoint import Checkpoint
from bivlm.compression import pack_layer
from bivlm.identity import step_identity
from bivlm.methods import LayerPlan
from bivlm.workspace import Reference
from tasks import grouping
from tasks.layers import Layer, do_layers
from tasks.policy import OVER_NETWORK
from tasks.steps import Done, open_workspace

STAGE = "pack"
FILE = "weight.packed"


@task(name="pack", task_run_name="pack-{chunk[0].name}", **OVER_NETWORK)
def pack_layers(chunk: list[Layer], workspace: str) -> dict[str, Done]:
    """The packed weights of a chunk of layers whose plans are done, one weight in memory at a time."""
    store = open_workspace(workspace)
    checkpoint = Checkpoint.open(chunk[0].folder)

    def identity(layer: Layer) -> dict[str, Any]:
        inputs = {"weight": layer.weight_sha256, "plan": _planned(layer).sha256}
        return step_identity(STAGE, layer.method.version, inputs, None, exact=True)

    def pack(layer: Layer, folder: Path) -> dict[str, Any]:
        plan = LayerPlan.model_validate_json(store.read(_planned(layer)))
        weight = checkpoint.read(layer.disk_name, layer.weight_sha256)
        packed, record = pack_layer(weight, plan, layer.name)
        (folder / FILE).write_bytes(memoryview(packed.numpy()))
        return record.model_dump(mode="json")

    return do_layers(chunk, workspace, identity, pack)


def _planned(layer: Layer) -> Reference:
    return layer.plan.record.outputs[grouping.FILE]
