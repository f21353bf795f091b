"""Bits are bytes: count what a checkpoint costs in its files.

Neither torch nor transformers is needed where names say which tensor is which, so that `bivlm bits` answers at once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from math import fsum, prod
from pathlib import Path
from typing import Any

from bivlm.checkpoint.architectures import ARCHITECTURES, COMPONENTS, Architecture
from bivlm.checkpoint.disk_names import packed_disk_names
from bivlm.checkpoint.reading import TABLES_KEY, Checkpoint
from bivlm.checkpoint.safetensors_file import TensorEntry, header_text, read_raw
from bivlm.errors import InputError
from bivlm.packing import FormatBits, open_packed

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

    >>> import bivlm
    >>> from bivlm.reference import CHECKPOINT
    >>> bits = bivlm.measure_bits(CHECKPOINT)
    >>> bits["linears"], bits["model"]["weights"], round(bits["model"]["stored"], 1)
    (None, 7177984, 16.0)
    """
    checkpoint = Checkpoint.open(folder)
    costs = [_cost(checkpoint.entries[disk_name], part) for disk_name, part in _packed_parts(checkpoint).items()]
    packed_weights = {cost.disk_name: cost.weights for cost in costs}
    parameters = sum(
        packed_weights.get(name, entry.numel if entry.is_floating else 0) for name, entry in checkpoint.entries.items()
    )
    if not parameters:
        raise InputError(f"checkpoint {folder}: holds no parameters")
    file_bytes = sum(file.stat().st_size for file in checkpoint.weight_files)
    by_part: dict[str, list[_Cost]] = defaultdict(list)
    for cost in costs:
        by_part[cost.part].append(cost)
    of_tables = by_part.pop(TABLES_KEY, [])
    return {
        "linears": _per_weight(cost for part in by_part.values() for cost in part) if by_part else None,
        "tables": _per_weight(of_tables) if of_tables else None,
        "model": {"stored": 8 * file_bytes / parameters, "weights": parameters},
        "by_component": {part: _per_weight(by_part[part]) for part in COMPONENTS if part in by_part},
    }


def named_parts(bits: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Return the parts of `bits_of` that there are, by the names that tables give them, the whole model last."""
    parts = [(LINEARS, bits.get("linears")), *(bits.get("by_component") or {}).items()]
    parts += [(EMBEDDINGS, bits.get("tables")), (MODEL, bits.get("model"))]
    return [(name, part) for name, part in parts if part]


@dataclass(frozen=True)
class _Cost:
    """What one packed weight costs: `stored` in bits, its header entry included."""

    disk_name: str
    part: str
    weights: int
    format: FormatBits
    stored: int


def _packed_parts(checkpoint: Checkpoint) -> dict[str, str]:
    """Return the component of every packed linear, or "tables", by the weight's name on disk."""
    if not checkpoint.packed:
        return {}
    disk_names = packed_disk_names(checkpoint) or {}
    members = _members(checkpoint)
    named = {name: members.component(name) for name in disk_names} if members else {}
    components = {name: component for name, component in named.items() if component is not None}
    if len(components) < len(checkpoint.packed):
        from bivlm.checkpoint.linears import anatomy  # takes seconds to import

        packed = [linear for name, linear in anatomy(checkpoint).packable.items() if name in checkpoint.packed]
        disk_names = {linear.name: linear.disk_name for linear in packed}
        components = {linear.name: linear.component for linear in packed}
    tables = (checkpoint.quantization or {}).get(TABLES_KEY, ())
    return {disk_names[name]: TABLES_KEY if name in tables else part for name, part in components.items()}


def _members(checkpoint: Checkpoint) -> Architecture | None:
    if checkpoint.modules:
        return Architecture.of_modules(checkpoint.modules)
    return ARCHITECTURES.get(checkpoint.config.get("model_type") or "")


def _cost(entry: TensorEntry, part: str) -> _Cost:
    packed = read_raw(entry)
    codec, header = open_packed(packed, entry.name)
    stored = 8 * (entry.nbytes + _header_bytes(entry))
    return _Cost(entry.name, part, prod(header.shape), codec.bits(packed, header), stored)


def _header_bytes(entry: TensorEntry) -> int:
    begin = entry.begin - entry.data_begin
    return len(header_text(entry.name, entry.dtype, entry.shape, begin, begin + entry.nbytes).encode("utf-8"))


def _per_weight(costs: Iterable[_Cost]) -> dict[str, float | int]:
    costs = list(costs)
    weights = sum(cost.weights for cost in costs)
    # fsum, whose result does not depend on the order.
    return {
        "nominal": fsum(cost.format.nominal for cost in costs) / weights,
        "entropy": fsum(cost.format.entropy for cost in costs) / weights,
        "stored": sum(cost.stored for cost in costs) / weights,
        "weights": weights,
    }
