"""What every form shares: the packed checkpoint that is read, and the new folder that is built beside its place."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

from bivlm.checkpoint.disk_names import packed_disk_names
from bivlm.checkpoint.linears import anatomy
from bivlm.checkpoint.outputs import LISTING, check_replaceable, fresh_partial
from bivlm.checkpoint.reading import LINEAGE, REPORT, Checkpoint
from bivlm.checkpoint.safetensors_file import OutgoingTensor, TensorEntry, outgoing_tensor, read_raw
from bivlm.errors import InputError
from bivlm.packing import container, unpack
from bivlm.workspace.places import base_place, output_folder, output_place, refuse_overlaps
from bivlm.workspace.stores.folder import flush_folder

DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
PACKED = "packed"  # a folder in the export: records of the packed checkpoint


def open_packed_checkpoint(folder: str | Path) -> Checkpoint:
    """Open a packed checkpoint; raises `InputError` if `folder` holds none."""
    checkpoint = Checkpoint.open(folder)
    if not checkpoint.packed:
        raise InputError(f"model {folder}: expected a packed checkpoint; it has none of bivlm's packed weights")
    return checkpoint


def names_of_packed(checkpoint: Checkpoint) -> dict[str, str]:
    """Return the name on disk of every packed weight by its name in the loaded model."""
    names = packed_disk_names(checkpoint)
    if names is not None:
        return names
    packable = anatomy(checkpoint).packable
    return {name: linear.disk_name for name, linear in packable.items() if name in checkpoint.packed}


@contextmanager
def new_folder(checkpoint: Checkpoint, output: str | Path) -> Iterator[Path]:
    """Yield an empty folder to be filled; at the end it gets the records of `checkpoint` and becomes `output`.

    If anything is raised meanwhile, nothing is left. Raises `InputError` if `output` overlaps the checkpoint, is not
    new or empty, or is a place that no folder can take: a link, a mount, one below a file.
    """
    output = output_folder(output)
    refuse_overlaps([output_place(output), base_place(checkpoint.folder)])
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise InputError(f"output {output}: expected a folder that is new or empty")
    check_replaceable(output)
    place = fresh_partial(output)
    try:
        yield place
        _copy_records(checkpoint.folder, place / PACKED)
        (place / LISTING).unlink()
        flush_folder(place)
        place.replace(output)
    except BaseException:
        shutil.rmtree(place, ignore_errors=True)
        raise


def rebuilt(entry: TensorEntry) -> OutgoingTensor:
    """Return the dense weight of a packed one, in the dtype it was packed from; it is rebuilt when its turn comes."""
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
