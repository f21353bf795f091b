"""Files of a checkpoint changed as somebody with an editor, or with the safetensors library, would."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file


def change_json(file: Path, change: Callable[[Any], object]) -> None:
    """Do `change` to what a JSON file holds."""
    value = json.loads(file.read_text())
    change(value)
    file.write_text(json.dumps(value))


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Do `change` to the tensors by name of a checkpoint with a single file."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
