"""A packed checkpoint in the format ``pack-quantized`` of the library compressed-tensors.

A weight is ``(code - zero) * scale`` there as here. config.json switches on transformers' option `dequantize`: each
weight is decoded once, while it is loaded, in the dtype of its scales, and then rounded to the model's dtype. Scales
have 11 significant bits. They are stored in the weight's dtype where that holds them, else as float32, in which the
product is exact. Without the option scales would be rounded to the model's dtype first, and zero points not be loaded
at all (compressed-tensors 0.20 expects them in another shape).

Tensors of the weight ``NAME.weight`` (M, N) with G groups in a row:

========================== ======= =============================
name                       dtype   shape
========================== ======= =============================
``NAME.weight_packed``     int32   (M, words of N codes)
``NAME.weight_scale``      float   (M, G)
``NAME.weight_zero_point`` int32   (words of M zero points, G)
``NAME.weight_shape``      int64   (2,)
========================== ======= =============================

Layout: compressed_tensors ``compressors/pack_quantized``; loading: transformers ``integrations/compressed_tensors.py``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from bivlm.checkpoint.conversion import loaded_names
from bivlm.checkpoint.linears import skeleton
from bivlm.checkpoint.outputs import some_of
from bivlm.checkpoint.reading import CONFIG, Checkpoint
from bivlm.checkpoint.safetensors_file import OutgoingTensor, TensorEntry, outgoing, outgoing_tensor, read_raw
from bivlm.checkpoint.writing import MAX_SHARD_BYTES, check_loads, copy_files, write_config, write_weights
from bivlm.errors import InputError
from bivlm.exports.building import DTYPES, names_of_packed, new_folder, open_packed_checkpoint, rebuilt
from bivlm.exports.int32_words import pack_words, row_words
from bivlm.exports.one_grid import Grid, Layout, smallest_grid
from bivlm.packing import Integers, grouped, integers, open_packed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FORMAT = "pack-quantized"
_MOST_BITS = 8
_CHUNK_CODES = 1 << 22
_ELSE = "export it with --to dense"


@dataclass(frozen=True)
class PackedWeight:
    """A packed weight: its name in the loaded model, where it lies, the dtype it is rebuilt in, and of its scales."""

    name: str
    entry: TensorEntry
    dtype: torch.dtype
    scale_dtype: torch.dtype
    layout: Layout

    def integers(self) -> Integers:
        """Read the weight; its contents were checked."""
        found = integers(torch.from_numpy(read_raw(self.entry)), self.entry.name)
        assert found is not None
        return found


def export_compressed_tensors(
    folder: str | Path, output: str | Path, max_shard_bytes: int = MAX_SHARD_BYTES
) -> list[str]:
    """Write a packed checkpoint for compressed-tensors; return sentences about what is stored otherwise than packed.

    Loaded by transformers, every weight is the packed one to the last bit. What is not packed is copied byte for byte,
    tokenizer, processor and licences, too, and the records of the packed checkpoint come along. One tensor is in
    memory at a time. Raises `InputError` naming a layer that the format does not hold exactly, and as `export_dense`.
    """
    checkpoint = open_packed_checkpoint(folder)
    with new_folder(checkpoint, output) as place:
        model, names = skeleton(checkpoint), names_of_packed(checkpoint)
        _check_loading(model, checkpoint, names)
        weights = [described(name, checkpoint.entries[names[name]]) for name in sorted(names)]
        dtype = _loaded_dtype(checkpoint, weights)
        _check_kept(model, checkpoint, getattr(torch, dtype))
        grid = smallest_grid(weight.layout for weight in weights)
        held = {weight.entry.name: weight for weight in weights if grid.holds(weight.layout)}
        if not held:
            found = f"groups of {weights[0].layout.width} columns"
            raise InputError(f"{weights[0].name}: {found}, with which compressed-tensors is larger than dense; {_ELSE}")
        packed = set(names.values())
        tensors: list[OutgoingTensor] = []
        for name, entry in checkpoint.entries.items():
            if name in held:
                tensors += tensors_of(held[name], grid)
            else:
                tensors.append(rebuilt(entry) if name in packed else outgoing(entry))
        write_weights(tensors, place, max_shard_bytes)
        copy_files(checkpoint, place)
        targets = [weight.name for weight in held.values()]
        quantization = quantization_config(grid, targets, model)
        write_config({**checkpoint.config, "dtype": dtype, "quantization_config": quantization}, place)
    return _told(weights, grid)


def described(name: str, entry: TensorEntry) -> PackedWeight:
    """Return what is to be known of a packed weight before it is written.

    Raises `InputError` for one that is damaged, or that is not integers times scales of groups.
    """
    packed = torch.from_numpy(read_raw(entry))
    codec, header = open_packed(packed, entry.name)
    found = codec.integers(packed, header)
    if found is None:
        grids = codec.name == grouped.NAME
        kind = "grouped integers with channel scales (awq)" if grids else f"packed by codec {codec.name!r}"
        raise InputError(
            f"{name}: {kind}; compressed-tensors holds integers times one scale per group (rtn, gptq); {_ELSE}"
        )
    bits = max(found.stride * found.largest, int(found.zeros_MG.max())).bit_length()
    if bits > _MOST_BITS:
        raise InputError(f"{name}: integers of {bits} bits, compressed-tensors holds up to {_MOST_BITS}; {_ELSE}")
    exact = bool(torch.equal(found.scales_MG.to(header.dtype).float(), found.scales_MG))
    scale_dtype = header.dtype if exact else torch.float32
    layout = Layout(header.shape, bits, found.width, header.dtype.itemsize, scale_dtype.itemsize)
    return PackedWeight(name, entry, header.dtype, scale_dtype, layout)


def _check_loading(model: PreTrainedModel, checkpoint: Checkpoint, names: dict[str, str]) -> None:
    """Raise `InputError` naming a tensor that transformers would not load from the export as from the checkpoint.

    Its decoding loses weights that are stacked or merged while loading, as experts are, and replaces ends of names.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, apply_renamings

    check_loads(checkpoint, checkpoint.folder)
    for disk_name, goal in loaded_names(model, checkpoint.entries).items():
        if goal.converted and disk_name.endswith(".weight"):
            raise InputError(
                f"{disk_name}: transformers makes {goal.names[0]} of such tensors, which fails beside weights that it "
                f"decodes; {_ELSE}"
            )
    renamings = [rule for rule in get_model_conversion_mapping(model) if isinstance(rule, WeightRenaming)]
    for name, disk_name in names.items():
        beside = f"{disk_name}_packed"
        if apply_renamings(beside, renamings) != f"{apply_renamings(disk_name, renamings)}_packed":
            raise InputError(f"{name}: {disk_name} is renamed while loading, and {beside} would not be; {_ELSE}")


def _loaded_dtype(checkpoint: Checkpoint, weights: Iterable[PackedWeight]) -> str:
    """Return the dtype in which the model is loaded: by config.json, else that of all its weights.

    Raises `InputError` naming a weight that is rounded to another one first.
    """
    said = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")
    if said is None:
        found = {weight.dtype for weight in weights}
        others = {entry.dtype for entry in checkpoint.entries.values() if entry.is_floating}
        if len(found) > 1 or others - {DTYPES[_name(dtype)] for dtype in found}:
            raise InputError(f"{checkpoint.folder / CONFIG}: dtype: expected one, since tensors are of several dtypes")
        return _name(*found)
    said = str(said).removeprefix("torch.")
    if said not in DTYPES:
        raise InputError(f"{checkpoint.folder / CONFIG}: dtype {said}, expected one of {', '.join(DTYPES)}")
    for weight in weights:
        if weight.dtype != torch.float32 and _name(weight.dtype) != said:
            raise InputError(
                f"{weight.name}: packed as {_name(weight.dtype)} in a model of {said}: it would not be rounded to the "
                f"first; {_ELSE}"
            )
    return said


def _check_kept(model: PreTrainedModel, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
    """Raise `InputError` naming a weight that transformers keeps in float32, which it does not while it decodes."""
    from transformers.core_model_loading import build_glob_alternation

    plan = model._get_dtype_plan(dtype)
    if not plan:
        return
    kept, *_ = build_glob_alternation(list(plan))
    for disk_name, goal in loaded_names(model, checkpoint.entries).items():
        if goal.names[0].endswith(".weight") and kept.search(goal.names[0]):
            raise InputError(
                f"{disk_name}: transformers keeps it in float32, but not beside weights that it decodes; {_ELSE}"
            )


def tensors_of(weight: PackedWeight, grid: Grid) -> Iterator[OutgoingTensor]:
    """Yield the four tensors of a weight; each reads the packed one when its turn comes."""
    (rows, columns), name = weight.layout.shape, weight.entry.name
    words, groups = row_words(columns, grid.bits), grid.groups(columns)
    zero_words, scale = row_words(rows, grid.bits), weight.scale_dtype
    yield OutgoingTensor(f"{name}_packed", "I32", (rows, words), 4 * rows * words, partial(_codes, weight, grid))
    yield OutgoingTensor(
        f"{name}_scale",
        DTYPES[_name(scale)],
        (rows, groups),
        scale.itemsize * rows * groups,
        lambda: outgoing_tensor(name, _by_group(weight.integers().scales_MG, weight, grid).to(scale)).chunks(),
    )
    yield OutgoingTensor(
        f"{name}_zero_point",
        "I32",
        (zero_words, groups),
        4 * zero_words * groups,
        partial(_zero_points, weight, grid),
    )
    yield outgoing_tensor(f"{name}_shape", torch.tensor(weight.layout.shape))


def _codes(weight: PackedWeight, grid: Grid) -> Iterator[memoryview]:
    found, (rows, columns) = weight.integers(), weight.layout.shape
    step = max(1, _CHUNK_CODES // columns)
    for begin in range(0, rows, step):
        codes_mN = found.codes(torch.arange(begin, min(begin + step, rows))).numpy()
        yield pack_words(codes_mN * np.uint8(found.stride), grid.bits).data.cast("B")


def _zero_points(weight: PackedWeight, grid: Grid) -> Iterator[memoryview]:
    zeros_MG = _by_group(weight.integers().zeros_MG, weight, grid).numpy()
    words_GW = pack_words(np.ascontiguousarray(zeros_MG.T), grid.bits)
    yield np.ascontiguousarray(words_GW.T).data.cast("B")


def _by_group(numbers_MG: torch.Tensor, weight: PackedWeight, grid: Grid) -> torch.Tensor:
    """Return the numbers of the grid's groups, from those of the weight's own groups in which they lie."""
    if grid.width is None:
        return numbers_MG
    begins = torch.arange(0, weight.layout.shape[1], grid.width)
    return numbers_MG[:, begins // weight.layout.width]


def quantization_config(grid: Grid, targets: list[str], model: PreTrainedModel) -> dict[str, Any]:
    """Return the quantization config; names of modules are those in the loaded model."""
    linears = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    weights = {
        "num_bits": grid.bits,
        "type": "int",
        "symmetric": False,
        "strategy": "channel" if grid.width is None else "group",
        "group_size": grid.width,
        "dynamic": False,
    }
    scheme = {
        "targets": targets,
        "weights": weights,
        "input_activations": None,
        "output_activations": None,
        "format": FORMAT,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": FORMAT,
        "quantization_status": "compressed",
        "dequantize": True,
        "config_groups": {"group_0": scheme},
        "ignore": sorted(set(linears) - set(targets)),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _told(weights: list[PackedWeight], grid: Grid) -> list[str]:
    """Return sentences about weights that are rebuilt, or stored on a finer grid than their own."""
    sentences = []
    dense = [weight.name for weight in weights if not grid.holds(weight.layout)]
    kind = f"{grid.bits} bits, " + ("one group per row" if grid.width is None else f"groups of {grid.width}")
    if dense:
        sentences.append(f"stored dense, all others have {kind}: {some_of(dense)}")
    held = [weight for weight in weights if grid.holds(weight.layout)]
    finer = [each.name for each in held if each.layout.bits < grid.bits or each.layout.width > _width(each, grid)]
    if finer:
        sentences.append(f"stored with {kind}, as all have to be of one kind: {some_of(finer)}")
    return sentences


def _width(weight: PackedWeight, grid: Grid) -> int:
    return grid.width or weight.layout.shape[1]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
