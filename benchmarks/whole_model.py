"""A 7B model that runs packed: ``python -m benchmarks.whole_model [--kinds NAME ...] [--folder DIR]``.

A checkpoint of Qwen2.5-VL-7B's shapes, every linear layer of random packed bits (layers of one shape have the same),
embedding and head at 4 bits. It is loaded with ``dequantize: packed`` and asked to go on from a prompt of random
tokens, in a process of its own: seconds of loading, seconds to the first token, tokens a second after it, and the peak
of resident memory. Beside it torch in bfloat16, a model with few layers: its time a token is extrapolated from that of
two depths, since all of it would take 15 GB.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, get_args

import torch
from transformers import AutoModelForImageTextToText, GenerationConfig, PreTrainedModel

from benchmarks.products import KINDS
from benchmarks.size import config_of, drawn, write_tensors_of
from bivlm.checkpoint.reading import FORMAT, QUANT_METHOD
from bivlm.checkpoint.safetensors_file import OutgoingTensor
from bivlm.packing import Activations

LAYERS, DEPTHS = 28, (2, 6)
TABLE = "4 bits in groups of 128"
PROMPT, TOKENS = 24, 24


def write(folder: Path, kind: str, layers: int) -> float:
    """Write the checkpoint; returns the gigabytes of its weights."""
    config = config_of(layers)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    made: dict[tuple[tuple[int, int], str], bytes] = {}
    packed: dict[str, int] = {}
    tensors = []
    for name, each in model.state_dict().items():
        owner = model.get_submodule(name.rpartition(".")[0])
        if name.endswith(".weight") and isinstance(owner, torch.nn.Linear | torch.nn.Embedding):
            table = each.shape[0] == config.text_config.vocab_size
            key = (tuple(each.shape), TABLE if table else kind)
            if key not in made:
                made[key] = KINDS[key[1]](key[0]).numpy().tobytes()
            content = made[key]
            packed[name.removesuffix(".weight")] = len(content)
            tensors.append(OutgoingTensor(name, "U8", (len(content),), len(content), lambda content=content: [content]))
        else:
            tensors.append(OutgoingTensor(name, "BF16", tuple(each.shape), 2 * each.numel(), drawn(name, each.numel())))
    config.quantization_config = {"quant_method": QUANT_METHOD, "format": FORMAT, "packed": packed}
    write_tensors_of(folder, config, tensors)
    return sum(tensor.nbytes for tensor in tensors) / 1e9


class Clock:
    """A streamer that notes when tokens come; the first call is the prompt's."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, _: Any) -> None:
        """Note the time."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Do nothing."""


def speeds(model: PreTrainedModel) -> dict[str, float]:
    """Return seconds to the first token, and the median of those of each other."""
    clock, ids = Clock(), torch.randint(1000, 100000, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    how = GenerationConfig(do_sample=False, max_new_tokens=TOKENS, min_new_tokens=TOKENS, pad_token_id=0)
    started = time.perf_counter()
    with torch.inference_mode():
        model.generate(input_ids=ids, generation_config=how, streamer=clock)  # type: ignore[operator]
    times = clock.times[1:]
    return {"first": times[0] - started, "token": median(b - a for a, b in pairwise(times))}


def packed_model(folder: Path, activations: Activations) -> dict[str, float]:
    """Return what loading and running the packed checkpoint takes, of this process."""
    from bivlm.checkpoint.transformers_plugin import BiVLMConfig

    started = time.perf_counter()
    config = BiVLMConfig(dequantize="packed", activations=activations)
    model = AutoModelForImageTextToText.from_pretrained(folder, quantization_config=config, dtype=torch.float32).eval()
    found = {"loading": time.perf_counter() - started} | speeds(model)
    return found | {"memory": _high_water()}


def dense_model() -> dict[str, float]:
    """Return seconds of a token in bfloat16 for as many layers, from those of two depths."""
    found = []
    for layers in DEPTHS:
        config = config_of(layers)
        config.vision_config.depth = 1
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
        model = model.to_empty(device="cpu").eval()
        for parameter in model.parameters():
            parameter.data.fill_(0.01)
        for buffer in model.buffers():
            buffer.data.fill_(0.01)
        found.append(speeds(model))
        del model
    first, second = DEPTHS
    return {
        key: found[0][key] + (found[1][key] - found[0][key]) / (second - first) * (LAYERS - first)
        for key in ("first", "token")
    }


def _high_water() -> float:
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024 / 1e9


def _apart(*told: str) -> dict[str, float]:
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.whole_model", *told]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def main() -> None:
    """Print a row for torch and one for each kind."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=["2 groups", "trellis 2.0, feedback to inputs"])
    parser.add_argument("--activations", nargs="+", choices=get_args(Activations), default=get_args(Activations))
    parser.add_argument("--folder", type=Path, help="for the checkpoints (default: a temporary one)")
    parser.add_argument("--packed", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--dense", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.packed or given.dense:
        print(json.dumps(packed_model(given.packed, given.activations[0]) if given.packed else dense_model()))
        return
    dense = _apart("--dense")
    print(f"{'':<42}{'GB':>6}{'loading s':>11}{'memory GB':>11}{'first s':>9}{'tokens/s':>10}{'x bf16':>8}")
    print(f"{'torch bfloat16, extrapolated':<42}{'':>28}{dense['first']:9.1f}{1 / dense['token']:10.2f}{1:8.2f}")
    for kind in given.kinds:
        with tempfile.TemporaryDirectory(dir=given.folder) as folder:
            size = write(Path(folder) / "model", kind, LAYERS)
            for activations in given.activations:
                found = _apart("--packed", str(Path(folder) / "model"), "--activations", activations)
                figures = f"{size:6.2f}{found['loading']:11.1f}{found['memory']:11.2f}{found['first']:9.1f}"
                speed = f"{1 / found['token']:10.2f}{dense['token'] / found['token']:8.2f}"
                print(f"{kind + ', ' + activations:<42}{figures}{speed}", flush=True)


if __name__ == "__main__":
    main()
