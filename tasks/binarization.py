"""Packed weights: one shard a layer, made from the weight and its plan."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from prefect import task
from safetensors import safe_open

from bivlm.compression.layer import pack_layer
from bivlm.methods.base import LayerPlan
from bivlm.numerics.input_statistics import SiteStatistics
from bivlm.untrusted import parse_model
from bivlm.workspace.hashing import step_identity
from bivlm.workspace.steps import Reference, Workspace
from tasks import grouping
from tasks.layers import Layer, do_layers, open_base
from tasks.runtime.policy import OVER_NETWORK
from tasks.runtime.steps import StepResult, open_workspace

STAGE = "pack"
FILE = "weight.packed"


@task(name="pack", task_run_name="pack-{chunk[0].name}", **OVER_NETWORK)
def pack_layers(chunk: list[Layer], workspace: str) -> dict[str, StepResult]:
    """The packed weights of a chunk of layers whose plans, and input statistics if they need any, are done.

    One weight is in memory at a time.
    """
    store = open_workspace(workspace)
    checkpoint = open_base(chunk)

    def identity(layer: Layer) -> dict[str, Any]:
        inputs = {"weight": layer.weight_sha256, "plan": _planned(layer).sha256}
        if layer.inputs is None:
            return step_identity(STAGE, layer.method.version, inputs, None, exact=True)
        # Factors and products of second moments differ in their last bits between machines' libraries.
        inputs["inputs"] = layer.inputs.sha256
        if layer.gradient_squares is not None:
            inputs["gradients"] = layer.gradient_squares.sha256
        return step_identity(STAGE, layer.method.version, inputs, None, exact=False)

    def pack(layer: Layer, folder: Path) -> dict[str, Any]:
        plan = parse_model(LayerPlan, store.read(_planned(layer)), f"plan of {layer.name}", "a plan")
        weight = checkpoint.read(layer.disk_name, layer.weight_sha256)
        packed, record = pack_layer(weight, plan, layer.name, _inputs(layer, store))
        (folder / FILE).write_bytes(memoryview(packed.numpy()))
        return record.model_dump(mode="json")

    return do_layers(chunk, workspace, identity, pack)


# Not inside the task: that travels to worker processes by value, and safetensors' class cannot.
def _inputs(layer: Layer, store: Workspace) -> SiteStatistics | None:
    if layer.inputs is None:
        return None
    inputs = SiteStatistics.load(store.fetch(layer.inputs))
    if layer.gradient_squares is None:
        return inputs
    with safe_open(store.fetch(layer.gradient_squares), framework="pt") as file:
        return replace(inputs, gradient_square_MN=file.get_tensor(layer.name))


def _planned(layer: Layer) -> Reference:
    return layer.plan.record.outputs[grouping.FILE]
