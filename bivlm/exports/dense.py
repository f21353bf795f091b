"""A packed checkpoint as an ordinary one, for programs that know no packed weights."""

from __future__ import annotations

from pathlib import Path

from bivlm.checkpoint.reading import Checkpoint
from bivlm.checkpoint.safetensors_file import outgoing
from bivlm.checkpoint.writing import MAX_SHARD_BYTES, check_loads, copy_files, write_config, write_weights
from bivlm.exports.building import names_of_packed, new_folder, open_packed_checkpoint, rebuilt
from bivlm.workspace.places import output_folder


def export_dense(folder: str | Path, output: str | Path, max_shard_bytes: int = MAX_SHARD_BYTES) -> Path:
    """Write a packed checkpoint with its weights rebuilt, each in the dtype it was packed from, and return the folder.

    The rest is copied byte for byte, tokenizer, processor and licences, too; config.json loses its quantization config.
    The records of the packed checkpoint come along in a folder of their own. One tensor is in memory at a time. Raises
    `InputError` if `folder` holds no packed checkpoint, a packed weight is damaged, or `output` is not new or empty.
    """
    checkpoint = open_packed_checkpoint(folder)
    with new_folder(checkpoint, output) as place:
        packed = set(names_of_packed(checkpoint).values())
        tensors = [rebuilt(entry) if name in packed else outgoing(entry) for name, entry in checkpoint.entries.items()]
        write_weights(tensors, place, max_shard_bytes)
        copy_files(checkpoint, place)
        write_config({key: value for key, value in checkpoint.config.items() if key != "quantization_config"}, place)
        check_loads(Checkpoint.open(place), place)
    return output_folder(output)
