"""Bits are bytes: what a checkpoint costs, counted in its files."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bivlm.checkpoint.linears import Linear, anatomy
from bivlm.checkpoint.reading import TABLES_KEY, Checkpoint
from bivlm.checkpoint.safetensors_file import TensorEntry, header_text
from bivlm.errors import InputError
from bivlm.packing import FormatBits, format_bits

LINEARS, EMBEDDINGS, MODEL = "packed linears", "embedding and head", "whole model"


def bits_of(folder: str | Path) -> dict[str, Any]:
    """Return the bits per weight of the checkpoint in `folder`, ready for JSON.

    ::

        {"linears": {"nominal", "entropy", "stored", "weights"},
         "tables": {"nominal", "entropy", "stored", "weights"},
         "model": {"stored", "weights"},
         "by_component": {component: {"nominal", "entropy", "stored", "weights"}}}

    The linears are the packed ones; their stored bits are the bytes of the packed tensors and of their entries in the
    files' headers, over the weights that they rebuild. "tables" are the same of a packed embedding of tokens and a head
    that is packed beside it, which do not count as linears. The model's are the bytes of its safetensors files, over
    all parameters once rebuilt. `nominal` and `entropy` are explained at `bivlm.packing.FormatBits`. What is not packed
    is None, and "by_component" without it. Raises `InputError` naming a damaged tensor or file.
    """
    checkpoint = Checkpoint.open(folder)
    parts = anatomy(checkpoint) if checkpoint.packed else None
    packed = [linear for name, linear in parts.packable.items() if name in checkpoint.packed] if parts else []
    tables = (checkpoint.quantization or {}).get(TABLES_KEY, ())
    of_tables = [_cost(linear, checkpoint) for linear in packed if linear.name in tables]
    costs: dict[str, list[_Cost]] = defaultdict(list)
    for linear in packed:
        if linear.name not in tables:
            costs[linear.component].append(_cost(linear, checkpoint))
    packed_weights = {linear.disk_name: linear.size for linear in packed}
    parameters = sum(
        packed_weights.get(name, entry.numel if entry.is_floating else 0) for name, entry in checkpoint.entries.items()
    )
    if not parameters:
        raise InputError(f"checkpoint {folder}: holds no parameters")
    file_bytes = sum(file.stat().st_size for file in checkpoint.weight_files)
    return {
        "linears": _per_weight(cost for group in costs.values() for cost in group) if costs else None,
        "tables": _per_weight(of_tables) if of_tables else None,
        "model": {"stored": 8 * file_bytes / parameters, "weights": parameters},
        "by_component": {component: _per_weight(group) for component, group in costs.items()},
    }


def named_parts(bits: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Return the parts of `bits_of` that there are, by the names that tables give them, the whole model last."""
    parts = [(LINEARS, bits.get("linears")), *(bits.get("by_component") or {}).items()]
    parts += [(EMBEDDINGS, bits.get("tables")), (MODEL, bits.get("model"))]
    return [(name, part) for name, part in parts if part]


@dataclass(frozen=True)
class _Cost:
    """What one packed linear costs: `stored` in bits, its header entry included."""

    weights: int
    format: FormatBits
    stored: int


def _cost(linear: Linear, checkpoint: Checkpoint) -> _Cost:
    packed = format_bits(checkpoint.read(linear.disk_name), linear.disk_name)
    entry = checkpoint.entries[linear.disk_name]
    return _Cost(linear.size, packed, 8 * (entry.nbytes + _header_bytes(entry)))


def _header_bytes(entry: TensorEntry) -> int:
    begin = entry.begin - entry.data_begin
    return len(header_text(entry.name, entry.dtype, entry.shape, begin, begin + entry.nbytes).encode("utf-8"))


def _per_weight(costs: Iterable[_Cost]) -> dict[str, float | int]:
    costs = list(costs)
    weights = sum(cost.weights for cost in costs)
    return {
        "nominal": sum(cost.format.nominal for cost in costs) / weights,
        "entropy": sum(cost.format.entropy for cost in costs) / weights,
        "stored": sum(cost.stored for cost in costs) / weights,
        "weights": weights,
    }
