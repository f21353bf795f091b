"""What the programs of all peers do: read samples, write what came of them. Knows torch alone."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

STORED, DENSE, RUN = "stored", "dense/model.safetensors", "run.json"


def write_samples(samples: list[dict[str, torch.Tensor]], file: Path) -> None:
    """Write the model inputs of every sample, as ``00000.input_ids`` and so on."""
    flat = {
        f"{index:05d}.{key}": value.contiguous() for index, each in enumerate(samples) for key, value in each.items()
    }
    save_file(flat, file)


def read_samples(file: str | Path) -> list[dict[str, torch.Tensor]]:
    """Return what `write_samples` wrote, in order."""
    samples: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    for name, value in load_file(file).items():
        index, _, key = name.partition(".")
        samples[index][key] = value
    return [samples[index] for index in sorted(samples)]


def run(
    quantize: Callable[..., None], rebuild: Callable[[Path, Path], dict[str, torch.Tensor]], arguments: list[str]
) -> None:
    """Carry out a peer's program with the arguments base, samples, output and settings.

    ``quantize(base, samples, stored, **settings)`` quantizes and saves into the folder `stored`, and
    ``rebuild(base, stored)`` returns all tensors of the dense model by their names on disk.
    """
    base, samples, output = map(Path, arguments[:3])
    settings: dict[str, Any] = json.loads(arguments[3])
    (output / DENSE).parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    quantize(base, read_samples(samples), output / STORED, **settings)
    dense = {name: tensor.detach().contiguous() for name, tensor in rebuild(base, output / STORED).items()}
    save_file(dense, output / DENSE, {"format": "pt"})
    (output / RUN).write_text(json.dumps({"settings": settings}) + "\n")
