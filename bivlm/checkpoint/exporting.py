"""A packed checkpoint as an ordinary one, for programs that know no packed weights."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import torch

from bivlm.checkpoint.disk_names import packed_disk_names
from bivlm.checkpoint.linears import anatomy
from bivlm.checkpoint.outputs import LISTING, fresh_partial
from bivlm.checkpoint.reading import LINEAGE, REPORT, Checkpoint
from bivlm.checkpoint.safetensors_file import OutgoingTensor, TensorEntry, outgoing, outgoing_tensor, read_raw
from bivlm.checkpoint.writing import MAX_SHARD_BYTES, check_loads, copy_files, write_config, write_weights
from bivlm.errors import InputError
from bivlm.packing import container, unpack
from bivlm.workspace.places import base_place, output_folder, output_place, refuse_overlaps
from bivlm.workspace.stores.folder import flush_folder

DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
PACKED = "packed"  # a folder in the export: records of the packed checkpoint


def export_dense(folder: str | Path, output: str | Path, max_shard_bytes: int = MAX_SHARD_BYTES) -> Path:
    """Write a packed checkpoint with its weights rebuilt, each in the dtype it was packed from, and return the folder.

    The rest is copied byte for byte, tokenizer, processor and licences, too; config.json loses its quantization config.
    The records of the packed checkpoint come along in a folder of their own. One tensor is in memory at a time. Raises
    `InputError` if `folder` holds no packed checkpoint, a packed weight is damaged, or `output` is not new or empty.
    """
    checkpoint, output = Checkpoint.open(folder), output_folder(output)
    if not checkpoint.packed:
        raise InputError(f"model {folder}: expected a packed checkpoint; it has none of bivlm's packed weights")
    refuse_overlaps([output_place(output), base_place(checkpoint.folder)])
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise InputError(f"output {output}: expected a folder that is new or empty")
    packed = set(_disk_names(checkpoint))
    place = fresh_partial(output)
    try:
        tensors = [_rebuilt(entry) if name in packed else outgoing(entry) for name, entry in checkpoint.entries.items()]
        write_weights(tensors, place, max_shard_bytes)
        copy_files(checkpoint, place)
        write_config({key: value for key, value in checkpoint.config.items() if key != "quantization_config"}, place)
        _copy_records(checkpoint.folder, place / PACKED)
        (place / LISTING).unlink()
        flush_folder(place)
        check_loads(Checkpoint.open(place), place)
        place.replace(output)
    except BaseException:
        shutil.rmtree(place, ignore_errors=True)
        raise
    return output


def _disk_names(checkpoint: Checkpoint) -> list[str]:
    names = packed_disk_names(checkpoint)
    if names is not None:
        return list(names.values())
    return [each.disk_name for name, each in anatomy(checkpoint).packable.items() if name in checkpoint.packed]


def _rebuilt(entry: TensorEntry) -> OutgoingTensor:
    """Return the dense weight of a packed one, which is rebuilt when its turn comes."""
    header = container.read_header(read_raw(entry), entry.name)
    nbytes = header.dtype.itemsize * math.prod(header.shape)
    return OutgoingTensor(entry.name, DTYPES[header.dtype_name], header.shape, nbytes, partial(_chunks, entry))


def _chunks(entry: TensorEntry) -> Iterable[bytes | memoryview]:
    weight = unpack(torch.from_numpy(read_raw(entry)), entry.name)
    return outgoing_tensor(entry.name, weight).chunks()


def _copy_records(folder: Path, place: Path) -> None:
    for name in (REPORT, LINEAGE):
        if (folder / name).is_file():
            place.mkdir(exist_ok=True)
            shutil.copyfile(folder / name, place / name)
