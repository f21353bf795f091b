"""AutoRound: signed gradient descent on rounding and clipping, block by block.

It leaves the projector's two layers at 16 bits. It tunes the vision tower's layers alone, not by block, at batch size
1. Its loader needs the block names corrected, or the language model's layers get random weights.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from auto_round import AutoRound
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor

from benchmarks.peers.exchange import run


def quantize(base: Path, samples: list[dict], stored: Path, *, bits: int, group_size: int, iters: int) -> None:
    model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.bfloat16)
    processor = AutoProcessor.from_pretrained(base)
    peer = AutoRound(
        model,
        processor.tokenizer,
        processor=processor,
        bits=bits,
        group_size=group_size,
        sym=False,
        iters=iters,
        dataset=samples,
        nsamples=len(samples),
        seqlen=max(each["input_ids"].shape[1] for each in samples),
        quant_nontext_module=True,  # the vision tower, too
        device_map="cpu",
        enable_torch_compile=False,  # takes longer than the work, for layers of this size
        seed=0,
    )
    with tempfile.TemporaryDirectory(dir=stored.parent) as place:  # it makes a folder of a name of its own there
        peer.quantize_and_save(place, format="auto_round")
        (made,) = Path(place).iterdir()
        shutil.rmtree(stored, ignore_errors=True)
        made.rename(stored)


def rebuild(base: Path, stored: Path) -> dict[str, torch.Tensor]:
    with tempfile.TemporaryDirectory() as place:
        corrected = shutil.copytree(stored, Path(place) / "corrected")
        _name_blocks(base, corrected)
        loaded = AutoModelForImageTextToText.from_pretrained(corrected, dtype=torch.bfloat16, device_map="cpu")
    dense = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.bfloat16)
    left = {name: value for name, value in loaded.state_dict().items() if name in dense.state_dict()}
    dense.load_state_dict(left, strict=False)
    for name, linear in dense.named_modules():
        module = loaded.get_submodule(name)
        if isinstance(linear, nn.Linear) and not isinstance(module, nn.Linear):
            module.bias = None
            linear.weight.data.copy_(module(torch.eye(linear.in_features)).T)
    with tempfile.TemporaryDirectory() as place:
        dense.save_pretrained(place)
        return load_file(Path(place) / "model.safetensors")


def _name_blocks(base: Path, stored: Path) -> None:
    """Name the quantized blocks as in the loaded model.

    The peer names them as on disk, which its own loader does not find: it leaves the language model's linears with
    random weights.
    """
    dense = AutoModelForImageTextToText.from_pretrained(base)
    blocks = [name for name, module in dense.named_modules() if isinstance(module, nn.ModuleList)]
    for name in ("config.json", "quantization_config.json"):
        file = stored / name
        config = json.loads(file.read_text())
        config.get("quantization_config", config)["block_name_to_quantize"] = ",".join(blocks)
        file.write_text(json.dumps(config, indent=2))


if __name__ == "__main__":
    run(quantize, rebuild, sys.argv[1:])
