"""Bits are bytes for peers, too: count what their own files hold for the linears."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bivlm.checkpoint.linears import Linear
from bivlm.checkpoint.safetensors_file import read_entries
from bivlm.errors import InputError

SUFFIXES = (".safetensors", ".pt")
NOT_THE_WEIGHTS = "bias"  # ours keep it as it is and do not count it either


@dataclass(frozen=True)
class StoredBits:
    """Bits per weight of the linears that our recipes pack, in a peer's files.

    Attributes:
        bits: over all of them; what the peer leaves in 16 bits counts 16.
        quantized_bits: over those that it quantizes.
        quantized: how many these are.
    """

    bits: float
    quantized_bits: float
    quantized: int


def tensor_bytes(folder: Path) -> dict[str, int]:
    """Return the bytes of every tensor in the files of weights in `folder`, safetensors or torch's own, by name.

    Entries in a file's header do not count. Raises `InputError` if there is no such file.
    """
    found: dict[str, int] = {}
    for file in weight_files(folder):
        if file.suffix == ".safetensors":
            found |= {entry.name: entry.nbytes for entry in read_entries(file)}
        else:
            found |= dict(_nested(torch.load(file, weights_only=True)))
    return found


def weight_files(folder: Path) -> list[Path]:
    """Return the files of weights in `folder`; raises `InputError` if there is none."""
    files = sorted(file for file in folder.iterdir() if file.suffix in SUFFIXES)
    if not files:
        raise InputError(f"{folder}: holds no file of weights, expected one that ends in {' or '.join(SUFFIXES)}")
    return files


def stored_bits(tensors: Mapping[str, int], linears: Sequence[Linear]) -> StoredBits:
    """Return the bits of the linears, of tensors by their bytes (`tensor_bytes`).

    A linear's tensors begin with its name, on disk or in the loaded model; it is quantized unless one of them is the
    weight itself. Raises `InputError` for a linear without tensors.
    """
    parts: dict[str, dict[str, int]] = {}
    for name, nbytes in tensors.items():
        owner, _, part = name.rpartition(".")
        if part != NOT_THE_WEIGHTS:
            parts.setdefault(owner, {})[part] = nbytes
    every, quantized = [], []
    for linear in linears:
        own = parts.get(linear.disk_name.removesuffix(".weight")) or parts.get(linear.name)
        if not own:
            raise InputError(f"{linear.name}: the peer's files hold no tensor of this linear")
        every.append((8 * sum(own.values()), linear.size))
        if "weight" not in own:
            quantized.append(every[-1])
    return StoredBits(_per_weight(every), _per_weight(quantized), len(quantized))


def model_bits(folder: Path, parameters: int) -> float:
    """Return the bits per parameter of the model's files, headers included."""
    return 8 * sum(file.stat().st_size for file in weight_files(folder)) / parameters


def _per_weight(costs: Sequence[tuple[int, int]]) -> float:
    if not costs:
        raise InputError("the peer's files hold no quantized linear")
    return sum(bits for bits, _ in costs) / sum(weights for _, weights in costs)


def _nested(state: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, int]]:
    for name, value in state.items():
        if isinstance(value, torch.Tensor):
            yield prefix + name, value.nbytes
        elif isinstance(value, Mapping):
            yield from _nested(value, f"{prefix}{name}.")
