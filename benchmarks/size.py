"""Time and peak memory of compressing checkpoints far larger than memory should be, as people do it.

``python -m benchmarks.size [--layers 10 28] [--folder DIR]`` writes random sharded bf16 checkpoints with the shapes of
Qwen2.5-VL-7B and so many language layers (10: 8 GB, 28: the whole 16.6 GB), runs ``bivlm compress`` on each in a
process of its own, and prints its peak of resident memory, its seconds and weights a second. The bound is 2.5 GB
whatever the number of layers. The folder needs 1.6 times the largest checkpoint of free space.

With ``--calibrated`` it is a LLaVA with one block of a 7B model's shapes (the rest is the reference model's) and GPTQ,
or the recipe that is named, on four samples; the bound is three times the block's bytes and those of its second
moments, 6.1 GB, and 15 GB where the outputs have moments, too.

The peak is the sum over the command and the processes it starts, each at its own highest point. Nothing is evaluated.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml
from more_itertools import constrained_batches
from transformers import AutoConfig, AutoModelForImageTextToText, PretrainedConfig, Qwen2_5_VLConfig

from bivlm.checkpoint.safetensors_file import OutgoingTensor, file_order, write_tensors
from bivlm.methods import method
from bivlm.recipe.loading import load_recipe
from bivlm.reference import CHECKPOINT

BOUND = 2.5e9
SHARD_BYTES = 4_000_000_000
POOL = 1 << 22  # random numbers, of which every tensor takes some
COMPONENTS = {part: {"method": "bivlm", "groups": 2, "p_max": 0.01} for part in ("vision", "adaptor", "language")}
TEXT = {"hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28, "num_key_value_heads": 4}
TEXT |= {"tie_word_embeddings": False}
RECIPE = {"name": "size", "format": 1, "components": COMPONENTS, "tables": 4}


def main(arguments: Sequence[str] | None = None) -> int:
    """Print one row a checkpoint; returns 1 if one takes more memory than the bound."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.size", description=__doc__.partition("\n")[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[10, 28], help="of the language model")
    parser.add_argument("--folder", type=Path, help="for checkpoints and workspace (default: a temporary one)")
    parser.add_argument("--calibrated", nargs="?", const="gptq-w3g128", metavar="RECIPE", help="one block")
    options = parser.parse_args(arguments)
    if options.calibrated:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            return _calibrated(Path(folder), options.calibrated)
    worst = 0
    for layers in options.layers:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            worst = max(worst, _row(Path(folder), layers))
    print(f"largest peak {worst / 1e9:.2f} GB; bound {BOUND / 1e9:g} GB; {os.cpu_count()} cores")
    return int(worst >= BOUND)


def _calibrated(place: Path, name: str) -> int:
    config = AutoConfig.from_pretrained(CHECKPOINT)
    text = config.text_config
    for key, value in TEXT.items():
        setattr(text, key, value)
    text.num_hidden_layers, text.layer_types = 1, ["full_attention"]
    weights = _write(place / "base", config)
    for file in CHECKPOINT.iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            shutil.copy(file, place / "base")
    recipe = load_recipe(name).canonical()
    recipe["calibration"] |= {"samples": 4, "held_out": 1}
    peak = _compressed(place, recipe, weights, f"one block of a 7B model by {name}")
    wide, hidden = TEXT["intermediate_size"], TEXT["hidden_size"]
    kept = TEXT["num_key_value_heads"] * hidden // TEXT["num_attention_heads"]
    block = 2 * (2 * hidden**2 + 2 * kept * hidden + 3 * hidden * wide)
    moments = 4 * (3 * hidden**2 + wide**2)
    settings = load_recipe(name).components["language"]
    if "moments" in method(settings.method).needs(settings):
        moments += 4 * (3 * hidden**2 + 2 * kept**2 + 2 * wide**2)
    ratio = peak / (block + moments)
    print(f"{ratio:.2f} times the block's {block / 1e9:.2f} GB and its second moments' {moments / 1e9:.2f} GB; bound 3")
    return int(ratio >= 3)


def _row(place: Path, layers: int) -> int:
    return _compressed(place, RECIPE, write_checkpoint(place / "base", layers), f"{layers} language layers")


def _compressed(place: Path, recipe: dict[str, Any], weights: int, name: str) -> int:
    base, output = place / "base", place / "packed"
    nbytes = sum(file.stat().st_size for file in base.glob("*.safetensors"))
    (place / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    names = {"model": base, "recipe": place / "recipe.yaml", "output": output, "workspace": place / "workspace"}
    told = [str(text) for name, value in names.items() for text in (f"--{name}", value)]
    started = time.perf_counter()
    command = [sys.executable, "-m", "flows.cli", "compress", *told, "--no-evaluate"]
    with (place / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        peak = _watched(process)
    seconds = time.perf_counter() - started
    if process.returncode:
        sys.exit((place / "log").read_text())
    report = json.loads((output / "compression_report.json").read_text())
    packed = sum(file.stat().st_size for file in output.glob("*.safetensors"))
    print(
        f"{name}, {nbytes / 1e9:.1f} GB: peak {peak / 1e9:.2f} GB, {seconds:.0f} s in all, "
        f"{report['seconds']:.0f} s of it compressing {weights / 1e9:.2f} G weights = "
        f"{weights / report['seconds'] / 1e6:.1f} M weights/s; {packed / 1e9:.2f} GB packed",
        flush=True,
    )
    return peak


def _watched(process: subprocess.Popen) -> int:
    """The sum of the highest resident sizes of a process and its children, once it has ended."""
    highest: dict[int, int] = {}
    while process.poll() is None:
        try:
            parent = psutil.Process(process.pid)
            for each in (parent, *parent.children(recursive=True)):
                highest[each.pid] = max(highest.get(each.pid, 0), _high_water(each.pid))
        except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
            pass
        time.sleep(0.05)
    return sum(highest.values())


def _high_water(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0  # it has ended


def write_checkpoint(folder: Path, layers: int) -> int:
    """A random Qwen2.5-VL of the 7B model's shapes and names on disk; returns the number of its parameters."""
    return _write(folder, config_of(layers), _disk_name)


def config_of(layers: int) -> Qwen2_5_VLConfig:
    """Return the config of a model of Qwen2.5-VL-7B's shapes with so many language layers."""
    rope = {"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": [16, 24, 24]}
    text = {**TEXT, "vocab_size": 152064, "num_hidden_layers": layers, "rope_parameters": rope}
    vision = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False)
    config.architectures, config.dtype = ["Qwen2_5_VLForConditionalGeneration"], torch.bfloat16
    return config


def _write(folder: Path, config: PretrainedConfig, disk_name: Callable[[str], str] = str) -> int:
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    tensors = [
        OutgoingTensor(disk_name(name), "BF16", tuple(each.shape), 2 * each.numel(), drawn(name, each.numel()))
        for name, each in model.state_dict().items()
    ]
    write_tensors_of(folder, config, tensors)
    return sum(each.numel() for each in model.parameters())


def write_tensors_of(folder: Path, config: PretrainedConfig, tensors: list[OutgoingTensor]) -> None:
    """Write a checkpoint of these tensors, in shards."""
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    shards = list(constrained_batches(tensors, SHARD_BYTES, get_len=lambda tensor: tensor.nbytes, strict=False))
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_tensors(folder / file, file_order(shard))
        weight_map |= {tensor.name: file for tensor in shard}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def _disk_name(name: str) -> str:
    """As in the published checkpoint."""
    return name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")


@cache
def _pool() -> torch.Tensor:
    return (0.02 * torch.randn(POOL, generator=torch.Generator().manual_seed(0))).to(torch.bfloat16)


def drawn(name: str, count: int) -> Callable[[], Iterator[bytes]]:
    """A function that gives the bytes of `count` random bfloat16 numbers, which depend on the name."""
    pool = _pool()

    def chunks() -> Iterator[bytes]:
        left, begin = count, sum(name.encode()) * 7919 % (POOL // 2)
        while left:
            part = pool[begin : begin + min(left, POOL // 2)]
            yield part.view(torch.uint8).numpy().tobytes()
            left -= len(part)

    return chunks


if __name__ == "__main__":
    sys.exit(main())
