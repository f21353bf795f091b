"""llm-compressor: GPTQ in one pass with its own observers of the weights' range.

Its sequential pipeline fails on the vision tower; `basic` works. Its own decompressor reads the checkpoint,
`from_pretrained` does not.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from benchmarks.peers.exchange import run

PACKED = ".weight_packed"


def quantize(base: Path, samples: list[dict], stored: Path, *, bits: int, group_size: int, observer: str) -> None:
    weights = {"num_bits": bits, "type": "int", "symmetric": False, "strategy": "group", "group_size": group_size}
    group = {"targets": ["Linear"], "weights": weights | {"observer": observer}}
    model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.bfloat16)
    oneshot(
        model=model,
        processor=AutoProcessor.from_pretrained(base),
        dataset=torch.utils.data.DataLoader(samples, batch_size=None, shuffle=False),
        num_calibration_samples=len(samples),
        recipe=GPTQModifier(ignore=["re:.*lm_head"], config_groups={"group_0": group}),
        # Its sequential pipeline, the default, fails on the vision tower: "No statistics available".
        pipeline="basic",
    )
    model.save_pretrained(stored, save_compressed=True)


def rebuild(_base: Path, stored: Path) -> dict[str, torch.Tensor]:
    """Decompress linear by linear: `from_pretrained` fails on the vision tower, whose initialization wants weights."""
    config = json.loads((stored / "config.json").read_text())["quantization_config"]
    quantization = QuantizationConfig.model_validate(
        {key: config[key] for key in ("config_groups", "format", "ignore")}
    )
    (scheme,) = quantization.config_groups.values()
    compressor = BaseCompressor.get_value_from_registry(quantization.format)
    tensors = load_file(stored / "model.safetensors")
    for name in [name.removesuffix(PACKED) for name in tensors if name.endswith(PACKED)]:
        names = [f"{name}.{part}" for part in compressor.compression_param_names(scheme)]
        parts = {each.removeprefix(f"{name}."): tensors.pop(each) for each in names}
        tensors[f"{name}.weight"] = compressor.decompress(parts, scheme)["weight"]
    return tensors


if __name__ == "__main__":
    run(quantize, rebuild, sys.argv[1:])
