"""One layer from weight and plan to packed bytes, with its error measured on what those bytes rebuild."""

from __future__ import annotations

import torch
from pydantic import BaseModel, ConfigDict

from bivlm.errors import InputError
from bivlm.methods import LayerPlan, method
from bivlm.packing import format_bits, unpack
from bivlm.statistics import CHUNK_WEIGHTS, check_weight


class LayerBits(BaseModel):
    """Bits a weight of one packed layer, see `bivlm.packing.FormatBits`."""

    model_config = ConfigDict(frozen=True)

    nominal: float
    entropy: float
    stored: float


class LayerRecord(BaseModel):
    """What packing a layer gave: `error` is ``||W - W_rebuilt||^2 / ||W||^2``, `nbytes` the packed tensor's length."""

    model_config = ConfigDict(frozen=True)

    error: float
    bits: LayerBits
    nbytes: int


def relative_error(weight_MN: torch.Tensor, rebuilt_MN: torch.Tensor) -> float:
    """``||W - W_rebuilt||^2 / ||W||^2``, both (M, N), summed in float64; 0 if both are all zero."""
    error = total = 0.0
    chunks = zip(weight_MN.reshape(-1).split(CHUNK_WEIGHTS), rebuilt_MN.reshape(-1).split(CHUNK_WEIGHTS), strict=True)
    for weight, rebuilt in chunks:
        weight = weight.to(torch.float64)
        total += float(weight.square().sum())
        error += float((weight - rebuilt.to(torch.float64)).square_().sum())
    if total == 0:
        return 0.0 if error == 0 else float("inf")
    return error / total


def pack_layer(weight_MN: torch.Tensor, plan: LayerPlan, name: str = "weight") -> tuple[torch.Tensor, LayerRecord]:
    """The packed weight, uint8 (bytes,), and its record, measured on the weight rebuilt from those bytes.

    Raises `InputError` naming `name` if `plan` was made for another shape or by another version of the method.
    """
    check_weight(weight_MN, name)
    chosen = method(plan.method)
    if tuple(weight_MN.shape) != plan.shape:
        raise InputError(f"{name}: the plan is for shape {plan.shape}, the weight has {tuple(weight_MN.shape)}")
    if plan.version != chosen.version:
        raise InputError(
            f"{name}: planned by {plan.method} version {plan.version}, this is version {chosen.version}: plan it again"
        )
    packed = chosen.quantize(weight_MN, plan)
    bits, size = format_bits(packed, name), weight_MN.numel()
    record = LayerRecord(
        error=relative_error(weight_MN, unpack(packed, name)),
        bits=LayerBits(nominal=bits.nominal / size, entropy=bits.entropy / size, stored=bits.stored / size),
        nbytes=packed.numel(),
    )
    return packed, record
