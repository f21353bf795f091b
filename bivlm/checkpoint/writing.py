"""The packed checkpoint: the base's folder with packed weights in place of the chosen ones."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from more_itertools import constrained_batches

from bivlm.checkpoint.architectures import MODULES_KEY
from bivlm.checkpoint.linears import Linear, skeleton
from bivlm.checkpoint.outputs import (
    check_replaceable,
    fresh_partial,
    list_files,
    replace,
    settle,
)
from bivlm.checkpoint.reading import CONFIG, FORMAT, QUANT_METHOD, WEIGHTS, WEIGHTS_INDEX, Checkpoint
from bivlm.checkpoint.safetensors_file import (
    CHUNK_BYTES,
    OutgoingTensor,
    TensorEntry,
    file_order,
    outgoing,
    read_entries,
    write_tensors,
)
from bivlm.errors import InputError
from bivlm.packing import open_packed
from bivlm.workspace.places import base_place, output_folder, output_place, refuse_overlaps
from bivlm.workspace.stores.folder import flush_folder

Packed = Callable[[], torch.Tensor] | Path
MAX_SHARD_BYTES = 5_000_000_000


def write_packed_checkpoint(
    checkpoint: Checkpoint,
    packed: Mapping[str, Packed],
    chosen: Sequence[Linear],
    output: str | Path,
    quantization_config: Mapping[str, Any],
    extra_files: Mapping[str, bytes] | None = None,
    leftovers: Path | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Path:
    """Write the packed checkpoint to the folder `output` and return it.

    `packed` gives every chosen linear, by name, its packed weight: a function that returns the tensor (uint8, 1-D;
    called once, when its turn comes) or a file whose bytes are the tensor. It is stored under the weight's own name on
    disk, and the linear's `copies` are left out. All other tensors, tokenizer, processor, templates and licences are
    copied byte for byte; config.json gets the quantization config: `quantization_config`, the checkpoint's `modules` if
    it has any and, by linear, the lengths of the packed tensors.
    `extra_files` are written beside them. `leftovers` is a safetensors file of tuned tensors that replace those of the
    base, which are of the same name on disk, shape and dtype and not packed.

    One tensor is in memory at a time. The folder is built beside `output` under a temporary name, compared with the
    model that is to be loaded from it, and put in its place by renaming: neither half a checkpoint nor one that does
    not load is ever seen, and an earlier output stays until then. The same input gives the same bytes. Of an earlier
    output only bivlm's own files go, see `bivlm.checkpoint.outputs`. Raises `InputError` as `check_output`, if a packed
    weight is damaged or not its linear's, a leftover is not the base's, or `from_pretrained` would refuse the result.
    """
    output = output_folder(output)
    check_output(checkpoint, output)
    _check_packed(packed, chosen)
    tuned = _leftovers(leftovers, checkpoint, chosen) if leftovers is not None else {}
    settle(output)
    partial = fresh_partial(output)
    spool = partial / ".packed"
    spool.mkdir()
    try:
        files = {linear.name: _spooled(linear, packed[linear.name], spool / str(i)) for i, linear in enumerate(chosen)}
        lengths = {name: file.stat().st_size for name, file in files.items()}
        by_disk_name = {linear.disk_name: files[linear.name] for linear in chosen}
        copies = {copy for linear in chosen for copy in linear.copies}
        kept = {**checkpoint.entries, **tuned}
        tensors = [
            _packed_tensor(name, by_disk_name[name]) if name in by_disk_name else outgoing(entry)
            for name, entry in kept.items()
            if name not in copies
        ]
        write_weights(tensors, partial, max_shard_bytes)
        shutil.rmtree(spool)
        copy_files(checkpoint, partial)
        write_config(_packed_config(checkpoint, quantization_config, lengths), partial)
        for name, content in (extra_files or {}).items():
            _write_new(partial, name, content)
        list_files(partial, (file.relative_to(partial).as_posix() for file in partial.rglob("*") if file.is_file()))
        flush_folder(partial)
        check_loads(checkpoint, partial)
        replace(output, partial)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return output


def check_output(checkpoint: Checkpoint, output: str | Path) -> None:
    """Raise `InputError` unless `checkpoint` may be packed into the folder `output`: to be called before hours of work.

    It may not if the base is quantized already, or if `output` overlaps it, is no folder, or holds anything but an
    earlier packed checkpoint and files that can lie beside one (`bivlm.checkpoint.outputs`).
    """
    if checkpoint.quantization is not None:
        method = checkpoint.quantization.get("quant_method")
        raise InputError(f"checkpoint {checkpoint.folder}: already quantized ({method}); expected full precision")
    output = output_folder(output)
    refuse_overlaps([output_place(output), base_place(checkpoint.folder)])
    check_replaceable(output, checkpoint.folder)


def check_loads(base: Checkpoint, folder: Path) -> None:
    """Raise `InputError` naming a tensor that is missing in `folder`, or of another shape than the config says.

    `folder` holds `base` itself, or what was packed from it. Only headers are read.
    """
    from bivlm.checkpoint.transformers_plugin import check_headers  # brings in transformers

    check_headers(skeleton(base), Checkpoint.open(folder))


def _check_packed(packed: Mapping[str, Packed], chosen: Sequence[Linear]) -> None:
    names = {linear.name for linear in chosen}
    if names != set(packed):
        differing = sorted(names ^ set(packed))
        raise InputError(f"chosen linears and packed weights differ in {', '.join(differing[:3])} ({len(differing)})")


def _spooled(linear: Linear, packed: Packed, spool: Path) -> Path:
    """Return a file with the packed bytes, verified: their lengths are part of the safetensors header."""
    if isinstance(packed, Path):
        file, tensor = packed, torch.from_numpy(np.fromfile(packed, dtype=np.uint8))
    else:
        file, tensor = spool, packed()
    _, header = open_packed(tensor, linear.disk_name)
    if header.shape != linear.shape or header.dtype != linear.dtype:
        raise InputError(
            f"{linear.disk_name}: packed weight of shape {header.shape} and {header.dtype}, "
            f"the linear is {linear.shape} and {linear.dtype}"
        )
    if file is spool:
        spool.write_bytes(tensor.cpu().numpy().data)
    return file


def _leftovers(file: Path, checkpoint: Checkpoint, chosen: Sequence[Linear]) -> dict[str, TensorEntry]:
    """Return the tensors of a file that replace those of the base, by name, after a check."""
    packed = {name for linear in chosen for name in (linear.disk_name, *linear.copies)}
    tuned = {entry.name: entry for entry in read_entries(file)}
    for name, entry in tuned.items():
        replaced = checkpoint.entries.get(name)
        if replaced is None or name in packed:
            raise InputError(f"leftover {name}: expected a tensor that {checkpoint.folder} has and that is not packed")
        if (entry.dtype, entry.shape) != (replaced.dtype, replaced.shape):
            raise InputError(
                f"leftover {name}: {entry.dtype} of shape {entry.shape}, expected {replaced.dtype} of shape "
                f"{replaced.shape} as in {checkpoint.folder}"
            )
    return tuned


def write_weights(tensors: Sequence[OutgoingTensor], folder: Path, max_shard_bytes: int) -> None:
    """Write safetensors files of these tensors into `folder`, with an index if they are several."""
    shards = list(constrained_batches(tensors, max_shard_bytes, get_len=lambda tensor: tensor.nbytes, strict=False))
    if len(shards) <= 1:
        write_tensors(folder / WEIGHTS, file_order(tensors))
        return
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_tensors(folder / file, file_order(shard))
        weight_map.update({tensor.name: file for tensor in shard})
    total = sum(tensor.nbytes for tensor in tensors)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    _write_new(folder, WEIGHTS_INDEX, _json_bytes(index))


def _packed_tensor(name: str, file: Path) -> OutgoingTensor:
    nbytes = file.stat().st_size
    return OutgoingTensor(name, "U8", (nbytes,), nbytes, lambda: _file_chunks(file))


def copy_files(checkpoint: Checkpoint, folder: Path) -> None:
    """Copy what is read beside config and weights, and licences, into `folder`."""
    for file in (*checkpoint.side_files, *checkpoint.licence_files):
        target = folder / file.relative_to(checkpoint.folder)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, target)
        _sync_file(target)


def write_config(config: Mapping[str, Any], folder: Path) -> None:
    """Write config.json into `folder`."""
    _write_new(folder, CONFIG, _json_bytes(dict(config)))


def _packed_config(
    checkpoint: Checkpoint, quantization_config: Mapping[str, Any], lengths: dict[str, int]
) -> dict[str, Any]:
    announced = quantization_config.get("packed", lengths)
    if announced != lengths:
        wrong = next(name for name in {*announced, *lengths} if announced.get(name) != lengths.get(name))
        raise InputError(f"{wrong}: {lengths.get(wrong)} packed bytes, {announced.get(wrong)} were announced")
    quantization = {
        "quant_method": QUANT_METHOD,
        "format": FORMAT,
        "dequantize": "load",
        **({MODULES_KEY: checkpoint.modules} if checkpoint.modules else {}),
        **quantization_config,
        "packed": lengths,
    }
    return {**checkpoint.config, "quantization_config": quantization}


def _write_new(folder: Path, name: str, content: bytes) -> None:
    if Path(name).name != name or name in ("", ".."):
        raise InputError(f"extra file {name!r}: expected a plain file name")
    try:
        with (folder / name).open("xb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
    except FileExistsError:
        raise InputError(f"extra file {name!r}: the checkpoint has a file of that name") from None


def _json_bytes(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode("utf-8")


def _file_chunks(file: Path) -> Iterator[bytes]:
    with file.open("rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            yield chunk


def _sync_file(file: Path) -> None:
    with file.open("rb") as stream:
        os.fsync(stream.fileno())
