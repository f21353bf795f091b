"""What is in a checkpoint: its components, its linear layers and their statistics, and what is left alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from bivlm.checkpoint import Anatomy, Checkpoint, Linear, anatomy
from bivlm.packing import unpack
from bivlm.statistics import LayerStatistics


def inspect(folder: str | Path, *, statistics: bool = True) -> dict[str, Any]:
    """A description of the checkpoint in `folder`, ready for JSON. Reads one weight at a time.

    ::

        {"model_type", "quantization": method or None, "parameters",
         "components": {component: {"linears", "packed", "parameters", "share"}},
         "linears": [{"name", "disk_name", "component", "shape", "dtype", "packed", "tied_to",
                      "mean", "std", "kurtosis", "kl_gaussian"}],
         "left_alone": {"parameters", "share", "tensors": [{"name", "kind", "shape", "dtype", "parameters", "share"}]}}

    `share` is of all parameters. Linears stand in module order, a tied head among them although its parameters count
    as the embedding's. Statistics of a packed layer are those of its rebuilt weight, "dtype" is the weight's; with
    `statistics` false they are left out and no weight is read. Raises `InputError` naming a tensor that is damaged
    or has NaN or infinite weights.
    """
    checkpoint = Checkpoint.open(folder)
    parts = anatomy(checkpoint)
    parameters = sum(_own_size(linear) for linear in parts.linears) + sum(t.parameters for t in parts.left_alone)
    return {
        "model_type": checkpoint.config["model_type"],
        "quantization": (checkpoint.quantization or {}).get("quant_method"),
        "parameters": parameters,
        "components": _components(parts, checkpoint, parameters),
        "linears": [_describe(linear, checkpoint, statistics) for linear in parts.linears],
        "left_alone": _left_alone(parts, parameters),
    }


def _own_size(linear: Linear) -> int:
    return 0 if linear.tied_to else linear.size


def _components(parts: Anatomy, checkpoint: Checkpoint, parameters: int) -> dict[str, dict[str, float | int]]:
    described = {}
    for component in dict.fromkeys(linear.component for linear in parts.linears):
        members = [linear for linear in parts.linears if linear.component == component]
        size = sum(_own_size(linear) for linear in members)
        described[component] = {
            "linears": len(members),
            "packed": sum(linear.name in checkpoint.packed for linear in members),
            "parameters": size,
            "share": size / parameters,
        }
    return described


def _describe(linear: Linear, checkpoint: Checkpoint, statistics: bool) -> dict[str, Any]:
    packed = linear.name in checkpoint.packed
    described = {
        "name": linear.name,
        "disk_name": linear.disk_name,
        "component": linear.component,
        "shape": list(linear.shape),
        "dtype": str(linear.dtype).removeprefix("torch."),
        "packed": packed,
        "tied_to": linear.tied_to,
    }
    if statistics:
        summary = LayerStatistics.measure(_weight(linear, checkpoint, packed), 0.0, linear.disk_name).summary()
        described |= {key: summary[key] for key in ("mean", "std", "kurtosis", "kl_gaussian")}
    return described


def _weight(linear: Linear, checkpoint: Checkpoint, packed: bool) -> torch.Tensor:
    tensor = checkpoint.read(linear.disk_name)
    return unpack(tensor, linear.disk_name) if packed else tensor


def _left_alone(parts: Anatomy, parameters: int) -> dict[str, Any]:
    tensors = [
        {
            "name": tensor.disk_name,
            "kind": tensor.kind,
            "shape": list(tensor.shape),
            "dtype": tensor.dtype,
            "parameters": tensor.parameters,
            "share": tensor.parameters / parameters,
        }
        for tensor in parts.left_alone
    ]
    total = sum(tensor.parameters for tensor in parts.left_alone)
    return {"parameters": total, "share": total / parameters, "tensors": tensors}
