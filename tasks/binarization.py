"""Packed weights: one shard per layer, made from the weight and its plan, by whatever method (RTN and GPTQ, too)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from prefect import task
from safetensors import safe_open

from bivlm.compression.layer import pack_layer
from bivlm.methods.base import LayerPlan
from bivlm.numerics.input_statistics import SiteStatistics
from bivlm.untrusted import parse_model
from bivlm.workspace.hashing import step_identity
from bivlm.workspace.steps import Reference, Workspace
from tasks import grouping
from tasks.layers import Layer, Sources, do_layers
from tasks.runtime.policy import OVER_NETWORK
from tasks.runtime.steps import Figures, Identity, StepResult

STAGE = "pack"
FILE = "weight.packed"


@task(name="pack", task_run_name="pack-{chunk[0].name}", **OVER_NETWORK)
def pack_layers(chunk: list[Layer], workspace: str) -> dict[str, StepResult]:
    """Pack a chunk of layers whose plans, and input statistics if they need any, are done; steps by layer name.

    One weight is in memory at a time.
    """
    return do_layers(chunk, workspace, _identify, _pack)


def _identify(layer: Layer) -> Identity:
    inputs = {"weight": layer.weight_sha256, "plan": _plan_file(layer).sha256}
    if layer.inputs is not None:
        inputs["inputs"] = layer.inputs.sha256
        if layer.gradient_squares is not None:
            inputs["gradients"] = layer.gradient_squares.sha256
        if layer.gradient_moments is not None:
            inputs["moments"] = layer.gradient_moments.sha256
    # Factors and products of second moments differ in their last bits between machines' libraries.
    return step_identity(STAGE, layer.method.version, inputs, None, exact=layer.inputs is None)


def _pack(layer: Layer, sources: Sources, folder: Path) -> Figures:
    plan = parse_model(LayerPlan, sources.store.read(_plan_file(layer)), f"plan of {layer.name}", "a plan")
    weight = layer.read_weight(sources.base)
    packed, record = pack_layer(weight, plan, layer.name, read_inputs(layer, sources.store))
    (folder / FILE).write_bytes(memoryview(packed.numpy()))
    return record.model_dump(mode="json")


def read_inputs(layer: Layer, store: Workspace) -> SiteStatistics | None:
    """Return the statistics that the layer's method needs, from calibration; None if it needs none."""
    if layer.inputs is None:
        return None
    return replace(
        SiteStatistics.load(store.fetch(layer.inputs)),
        gradient_square_MN=_read_gradients(layer.gradient_squares, layer.name, store),
        gradient_moment_MM=_read_gradients(layer.gradient_moments, layer.name, store),
    )


def _read_gradients(file: Reference | None, name: str, store: Workspace) -> torch.Tensor | None:
    if file is None:
        return None
    with safe_open(store.fetch(file), framework="pt") as opened:
        return opened.get_tensor(name)


def _plan_file(layer: Layer) -> Reference:
    return layer.plan.record.outputs[grouping.FILE]
