"""The contents of a checkpoint: its components, its linear layers and their statistics, and what is left alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from bivlm.checkpoint.architectures import COMPONENTS, Modules
from bivlm.checkpoint.linears import Anatomy, Linear, anatomy
from bivlm.checkpoint.reading import Checkpoint
from bivlm.errors import InputError
from bivlm.numerics.weight_statistics import LayerStatistics
from bivlm.packing import unpack

OUTSIDE = "outside"  # of vision, adaptor and language


def inspect(folder: str | Path, *, statistics: bool = True, modules: Modules | None = None) -> dict[str, Any]:
    """Return a description of the checkpoint in `folder`, ready for JSON. Reads one weight at a time.

    `modules` say what is vision, adaptor and language in an architecture that bivlm does not know.

    ::

        {"model_type", "quantization": method or None, "parameters",
         "components": {component: {"linears", "packed", "parameters", "share"}},
         "parts": [{"component", "kind", "state", "tensors", "parameters", "share"}],
         "linears": [{"name", "disk_name", "component", "shape", "dtype", "packed", "tied_to",
                      "mean", "std", "kurtosis", "kl_gaussian"}],
         "left_alone": {"parameters", "share", "tensors": [{"name", "kind", "component", "shape", "dtype", "parameters",
                                                            "share"}]}}

    "parts" hold every tensor once: by component (or "outside") the linears, "packed" or "packable", and what is "left
    alone" by kind, in fewer words than a tensor's own; their shares add up to 1. `share` is of all parameters. Linears
    stand in module order, a tied head among them although its parameters count as the embedding's. Statistics of a
    packed layer are those of its rebuilt weight, "dtype" is the weight's; with `statistics` false they are left out and
    no weight is read. Raises `InputError` naming a tensor that is damaged or has NaN or infinite weights.
    """
    checkpoint = Checkpoint.open(folder, modules)
    parts = anatomy(checkpoint)
    own = [*parts.linears, *_packed_tokens(parts, checkpoint)]
    parameters = sum(_own_size(linear) for linear in own) + sum(t.parameters for t in parts.left_alone)
    if not parameters:
        raise InputError(f"checkpoint {folder}: holds no parameters")
    return {
        "model_type": checkpoint.config.get("model_type", "unknown"),
        "quantization": (checkpoint.quantization or {}).get("quant_method"),
        "parameters": parameters,
        "components": _components(parts, checkpoint, parameters),
        "parts": _parts(parts, checkpoint, parameters),
        "linears": [_describe(linear, checkpoint, statistics) for linear in parts.linears],
        "left_alone": _left_alone(parts, parameters),
    }


def _packed_tokens(parts: Anatomy, checkpoint: Checkpoint) -> list[Linear]:
    """Return the embedding of tokens if it is packed, else nothing: it then is left alone."""
    return [parts.tokens] if parts.tokens is not None and parts.tokens.name in checkpoint.packed else []


def _own_size(linear: Linear) -> int:
    return 0 if linear.tied_to else linear.size


def _components(parts: Anatomy, checkpoint: Checkpoint, parameters: int) -> dict[str, dict[str, float | int]]:
    described: dict[str, dict[str, float | int]] = {}
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


def _parts(parts: Anatomy, checkpoint: Checkpoint, parameters: int) -> list[dict[str, Any]]:
    """Return tensors by component, kind and state; within a component linears first, then larger before smaller."""
    sizes: dict[tuple[str, str, str], list[int]] = {}
    for linear in parts.linears:
        kind = "experts, one by one" if linear.stacked_in else "linear layers"
        state = "packed" if linear.name in checkpoint.packed else "packable"
        if linear.tied_to:
            kind, state = f"{linear.name}, tied", "packed" if linear.holder in checkpoint.packed else "left alone"
        counted = sizes.setdefault((linear.component, kind, state), [])
        if not linear.tied_to:
            counted.append(linear.size)
    for tokens in _packed_tokens(parts, checkpoint):
        sizes[tokens.component, "Embedding", "packed"] = [tokens.size]
    for tensor in parts.left_alone:
        place = (tensor.component or OUTSIDE, _group(tensor.kind), "left alone")
        sizes.setdefault(place, []).append(tensor.parameters)
    order = (*COMPONENTS, OUTSIDE)

    def rank(row: tuple[str, str, str]) -> tuple[int, bool, int, str]:
        component, kind, state = row
        return order.index(component), state == "left alone", -sum(sizes[row]), kind

    return [
        {
            "component": component,
            "kind": kind,
            "state": state,
            "tensors": len(sizes[component, kind, state]),
            "parameters": sum(sizes[component, kind, state]),
            "share": sum(sizes[component, kind, state]) / parameters,
        }
        for component, kind, state in sorted(sizes, key=rank)
    ]


def _group(kind: str) -> str:
    """Return the kind of a tensor left alone, as a row of a table has it: "Conv2d", "norms", "experts: down_proj"."""
    what, comma, further = kind.partition(",")
    module, dot, parameter = what.partition(".")
    if parameter == "bias":
        return "biases"
    if "expert" in module.lower():
        return f"experts: {parameter or 'weight'}"
    if comma:
        return f"{parameter or module},{further}"
    if "norm" in module.lower():
        return "norms"
    if dot:
        return parameter
    return next((word for word in ("Embedding", "Router") if module.endswith(word)), kind)


def _describe(linear: Linear, checkpoint: Checkpoint, statistics: bool) -> dict[str, Any]:
    packed = linear.holder in checkpoint.packed
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
            "component": tensor.component,
            "shape": list(tensor.shape),
            "dtype": tensor.dtype,
            "parameters": tensor.parameters,
            "share": tensor.parameters / parameters,
        }
        for tensor in parts.left_alone
    ]
    total = sum(tensor.parameters for tensor in parts.left_alone)
    return {"parameters": total, "share": total / parameters, "tensors": tensors}
