"""HQQ: half-quadratic splitting for the zero points, without calibration samples.

It needs the device of every module, and its loader makes no head.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
from hqq.models.hf.base import AutoHQQHFModel
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForImageTextToText

from benchmarks.peers.exchange import run


def quantize(base: Path, _samples: list[dict], stored: Path, *, bits: int, group_size: int, axis: int) -> None:
    model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.bfloat16)
    config = BaseQuantizeConfig(nbits=bits, group_size=group_size, axis=axis)
    # It knows the layout of language models only; "" is a block that every module is in.
    AutoHQQHFModel.quantize_model(model, config, compute_dtype=torch.bfloat16, device={"": "cpu"})
    stored.mkdir(exist_ok=True)
    AutoHQQHFModel.save_quantized(model, str(stored))


def rebuild(base: Path, stored: Path) -> dict[str, torch.Tensor]:
    """Load module by module: `from_quantized` makes a model without a head of anything but a language model."""
    dense = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.bfloat16)
    for name, state in AutoHQQHFModel.load_weights(str(stored), "cpu").items():
        module, bias = dense.get_submodule(name), state.get("bias")
        if "W_q" in state:
            linear = HQQLinear(None, None, compute_dtype=torch.bfloat16, device="cpu")
            linear.load_state_dict(state)
            state = {"weight": linear.dequantize(), **({} if bias is None else {"bias": bias})}
        for key, value in state.items():
            if isinstance(getattr(module, key), nn.Parameter):
                getattr(module, key).data.copy_(value)
    with tempfile.TemporaryDirectory() as place:
        dense.save_pretrained(place)
        return load_file(Path(place) / "model.safetensors")


if __name__ == "__main__":
    run(quantize, rebuild, sys.argv[1:])
