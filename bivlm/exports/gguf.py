"""A packed checkpoint as GGUF files for llama.cpp: the language model in one, vision and adaptor in another.

Every weight in them is the packed one to the last bit: it is decoded again by `gguf.quants` before it is written, and
compared. A packed linear layer that no block type holds is refused; embedding and head are then stored dense, because a
dense copy of them is exact, too. What was not packed keeps its dtype, or becomes float32 where llama.cpp wants that.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from bivlm.checkpoint.conversion import loaded_names
from bivlm.checkpoint.linears import skeleton, tied_tensors
from bivlm.checkpoint.reading import LINEAGE, REPORT, Checkpoint
from bivlm.checkpoint.safetensors_file import TensorEntry, read_raw, read_tensor, same_values
from bivlm.checkpoint.writing import check_loads
from bivlm.errors import InputError
from bivlm.exports.building import DTYPES, new_folder, open_packed_checkpoint
from bivlm.exports.gguf_blocks import BlockType, smallest_type, why_none, widened
from bivlm.exports.gguf_metadata import TEXT_ARCHITECTURES, check_config, describe_text, describe_vision
from bivlm.exports.gguf_names import TABLES, Part, text_parts, vision_parts
from bivlm.exports.gguf_tokenizer import describe_tokenizer
from bivlm.packing import Integers, integers, open_packed, unpack
from bivlm.workspace.hashing import file_digest

if TYPE_CHECKING:
    from gguf import GGUFWriter

MODEL, MMPROJ = "model.gguf", "mmproj.gguf"
_CHUNK_WEIGHTS = 1 << 22
_CLASS_TOKEN = (
    f"{MMPROJ}: has a class token, as CLIP's towers do. llama.cpp of 2026 (llama-cpp-python 0.3.36) puts it behind the "
    "patches and leaves out the first patch in its stead: images are seen wrongly there"
)
_DENSE = {"BF16": 2, "F16": 2, "F32": 4}  # bytes of a number
# What fits, by codec, for a message about a weight that does not.
_ADVICE = {
    "grouped": "expected no channel scales (method rtn or gptq)",
    "quantile": "expected no salient weights and levels at odd multiples (method bivlm with p_max: 0, levels: odd)",
}


@dataclass(frozen=True)
class Written:
    """A tensor of a GGUF file.

    Attributes:
        name: in the file.
        file: `MODEL` or `MMPROJ`.
        kind: the name of its `gguf.GGMLQuantizationType`.
        size: its numbers.
        nbytes: its bytes in the file.
        packed_nbytes: those of its share of the packed weight; None for one that was not packed.
    """

    name: str
    file: str
    kind: str
    size: int
    nbytes: int
    packed_nbytes: int | None

    @property
    def was_packed(self) -> bool:
        """Whether it is the whole or a part of a packed weight."""
        return self.packed_nbytes is not None


@dataclass(frozen=True)
class _Source:
    """A parameter: its tensor on disk, its shape by the config, and whether it is packed."""

    entry: TensorEntry
    shape: tuple[int, ...]
    packed: bool


@dataclass(frozen=True)
class _Tensor:
    """A tensor that will be written.

    Attributes:
        part: what it is.
        entry: the tensor on disk.
        shape: in the file, as in torch.
        kind: as in `Written`.
        block: the type of its blocks; None if it is dense.
        packed_nbytes: as in `Written`.
    """

    part: Part
    entry: TensorEntry
    shape: tuple[int, ...]
    kind: str
    block: BlockType | None
    packed_nbytes: int | None

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        size = math.prod(self.shape)
        return size * _DENSE[self.kind] if self.block is None else size // self.block.columns * self.block.nbytes

    def record(self, file: str) -> Written:
        """Return what was written."""
        return Written(self.part.name, file, self.kind, math.prod(self.shape), self.nbytes, self.packed_nbytes)


def export_gguf(folder: str | Path, output: str | Path) -> list[Written]:
    """Write a packed checkpoint as `MODEL` and `MMPROJ` into the folder `output`; return what is in them.

    The records of the packed checkpoint come along in a folder of their own, licences beside the files. One tensor is
    in memory at a time, as rebuilt. Raises `InputError` if the gguf package is not installed, `folder` holds no packed
    checkpoint or one that llama.cpp cannot run, a packed linear layer fits no block type, its bytes are damaged, or
    `output` is not new or empty.
    """
    if find_spec("gguf") is None:
        raise InputError("export to gguf: gguf is not installed; pip install 'bivlm[gguf]'")
    checkpoint = open_packed_checkpoint(folder)
    with new_folder(checkpoint, output) as place:
        config, sources = _opened(checkpoint)
        check_config(config, checkpoint.folder)
        parts = {MODEL: text_parts(config, sources), MMPROJ: vision_parts(config, sources, checkpoint.packed)}
        tensors = {file: _planned(of_file, sources) for file, of_file in parts.items()}
        for file, of_file in tensors.items():
            _write(_described(file, config, checkpoint), of_file, place / file)
        for licence in checkpoint.licence_files:
            shutil.copyfile(licence, place / licence.name)
    return [tensor.record(file) for file, of_file in tensors.items() for tensor in of_file]


def summary(written: Sequence[Written]) -> list[str]:
    """Return a line on each type in each file: how many numbers, and what they cost beside the packed weights."""
    lines = []
    for file, kind, was_packed in sorted({(each.file, each.kind, each.was_packed) for each in written}):
        some = [each for each in written if (each.file, each.kind, each.was_packed) == (file, kind, was_packed)]
        size = sum(each.size for each in some)
        line = f"{file}: {kind}: {len(some)} of the tensors, {size:,} numbers"
        line += f", {8 * sum(each.nbytes for each in some) / size:.3f} bits each"
        if was_packed:
            line += f", packed {8 * sum(each.packed_nbytes or 0 for each in some) / size:.3f}"
        if was_packed and kind in _DENSE:
            line += f": no block type holds {', '.join(each.name for each in some)}"
        lines.append(line)
    return [*lines, *([_CLASS_TOKEN] if any(each.name == "v.class_embd" for each in written) else [])]


def _opened(checkpoint: Checkpoint) -> tuple[Any, dict[str, _Source]]:
    """Return transformers' config and the tensor on disk of every parameter that is tied to no other.

    Raises `InputError` naming a tensor that is missing, of another shape than the config says, or made of several.
    """
    check_loads(checkpoint, checkpoint.folder)
    model = skeleton(checkpoint)
    sources = {}
    for disk_name, goal in loaded_names(model, checkpoint.entries).items():
        if goal.converted:
            raise InputError(f"{disk_name}: split or merged while loading; GGUF files are made of tensors as they are")
        sources[goal.names[0]] = disk_name
    entries = checkpoint.entries
    tied, held = tied_tensors(model, sources, lambda one, other: same_values(entries[one], entries[other]))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    return model.config, {
        name: _Source(entries[disk_name], shapes[name], name.removesuffix(".weight") in checkpoint.packed)
        for name, disk_name in held.items()
        if name not in tied and name in shapes
    }


def _planned(parts: list[Part], sources: Mapping[str, _Source]) -> list[_Tensor]:
    """Return the tensors of a file with the type of each; raises `InputError` naming a linear layer that fits none."""
    tensors, refused = [], []
    for part in parts:
        source = sources[part.parameter]
        try:
            tensors.append(_packed_tensor(part, source) if source.packed else _plain_tensor(part, source.entry))
        except _FitsNone as error:
            refused.append(f"{part.parameter}: {error}")
    if refused:
        more = f" (and {len(refused) - 1} more)" if len(refused) > 1 else ""
        raise InputError(f"{refused[0]}{more}; or keep the layer in the recipe, or export --to dense")
    return tensors


class _FitsNone(Exception):
    """No block type holds a packed linear layer; the message says why."""


def _packed_tensor(part: Part, source: _Source) -> _Tensor:
    entry = source.entry
    packed = torch.from_numpy(read_raw(entry))
    _, header = open_packed(packed, entry.name)
    if header.shape != source.shape:
        raise InputError(f"{entry.name}: packed weight of shape {header.shape}, {source.shape} by the config")
    opened = integers(packed, entry.name)
    rows = header.shape[0] if part.rows is None else len(part.rows)
    share = entry.nbytes * rows // header.shape[0]
    shape = (rows + part.more[0], header.shape[1] + part.more[1])
    block = None if opened is None else smallest_type(widened(opened, header.shape[1], part.more[1]), shape[1])
    if block is not None:
        return _Tensor(part, entry, shape, block.name, block, share)
    if part.name in TABLES:
        return _Tensor(part, entry, shape, DTYPES[header.dtype_name], None, share)
    if opened is None:
        advice = _ADVICE.get(header.codec, f"expected one of {', '.join(_ADVICE)}")
        raise _FitsNone(f"codec {header.codec}: no block type of GGUF holds it exactly; {advice}")
    raise _FitsNone(f"codec {header.codec}: no block type of GGUF holds it exactly: {why_none(opened, shape[1])}")


def _plain_tensor(part: Part, entry: TensorEntry) -> _Tensor:
    if entry.dtype not in _DENSE:
        raise InputError(f"{part.parameter}: dtype {entry.dtype}; GGUF holds {', '.join(_DENSE)}")
    shape = (len(part.rows) if part.rows is not None else entry.shape[0] + part.more[0], *entry.shape[1:])
    if part.frame is not None:
        shape = (*shape[:2], *shape[3:])
    # llama.cpp adds vectors and positions, and convolves, in float32.
    multiplied = len(shape) == 2 and not part.name.endswith("position_embd.weight")
    return _Tensor(part, entry, shape, entry.dtype if multiplied else "F32", None, None)


def _described(file: str, config: Any, checkpoint: Checkpoint) -> GGUFWriter:
    """Return a writer with all that a file says besides its tensors."""
    import gguf

    architecture = TEXT_ARCHITECTURES[config.text_config.model_type] if file == MODEL else "clip"
    writer = gguf.GGUFWriter(None, architecture)
    writer.add_type(gguf.GGUFType.MODEL if file == MODEL else gguf.GGUFType.MMPROJ)
    writer.add_name(checkpoint.folder.name)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for record, key in ((LINEAGE, "bivlm.lineage.sha256"), (REPORT, "bivlm.report.sha256")):
        if (checkpoint.folder / record).is_file():
            writer.add_string(key, file_digest(checkpoint.folder / record))
    if file == MODEL:
        describe_text(writer, config)
        describe_tokenizer(writer, checkpoint.folder, config.text_config.vocab_size)
    else:
        describe_vision(writer, config, checkpoint)
    return writer


def _write(writer: GGUFWriter, tensors: list[_Tensor], file: Path) -> None:
    """Write a file, one tensor after another, a few rows at a time, and flush it to the disk."""
    from gguf import GGMLQuantizationType

    for tensor in tensors:
        kind = GGMLQuantizationType[tensor.kind]
        # Of a type of blocks the shape counts bytes where the dtype is uint8, and numbers otherwise.
        writer.add_tensor_info(tensor.part.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, kind)
    try:
        writer.write_header_to_file(file)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        stream = (writer.fout or [])[0]
        writer.write_padding(stream, stream.tell())
        for tensor in tensors:
            written = sum(stream.write(chunk) for chunk in _chunks(tensor))
            if written != tensor.nbytes:
                raise InputError(f"{tensor.part.name}: {written} bytes came, {tensor.nbytes} were announced")
            writer.write_padding(stream, tensor.nbytes)
        stream.flush()
        os.fsync(stream.fileno())
    finally:
        writer.close()


def _chunks(tensor: _Tensor) -> Iterator[memoryview]:
    """Yield the bytes of a tensor."""
    if tensor.packed_nbytes is not None:
        packed = torch.from_numpy(read_raw(tensor.entry))  # checked when it was planned
        weight, opened = unpack(packed, tensor.entry.name, check=False), integers(packed, tensor.entry.name)
    else:
        weight, opened = read_tensor(tensor.entry), None
    if tensor.part.frame is not None:
        weight = weight[:, :, tensor.part.frame]
    order = torch.arange(len(weight)) if tensor.part.rows is None else torch.from_numpy(tensor.part.rows)
    for rows_m in order.split(max(1, _CHUNK_WEIGHTS * len(weight) // weight.numel())):
        rows = weight[rows_m]
        if tensor.block is None or opened is None:
            dtype = torch.float32 if tensor.kind == "F32" else rows.dtype
            yield rows.to(dtype).contiguous().view(-1).view(torch.uint8).numpy().data
        else:
            wide = widened(opened, rows.shape[1], tensor.part.more[1])
            yield _encoded(tensor.block, wide, rows_m, rows, tensor.entry.name).data
    yield memoryview(bytes(tensor.nbytes // tensor.shape[0] * tensor.part.more[0]))  # zeros in every type


def _encoded(block: BlockType, opened: Integers, rows_m: torch.Tensor, rows: torch.Tensor, name: str) -> np.ndarray:
    """Return the bytes of some rows after decoding them again; raises `InputError` if they are not the weights.

    The sign of a zero may differ.
    """
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    encoded = block.rows(opened, rows_m)
    decoded = torch.from_numpy(dequantize(encoded, GGMLQuantizationType[block.name]))
    if not torch.equal(decoded[:, : rows.shape[1]].to(rows.dtype), rows):
        raise InputError(f"{name}: {block.name} does not decode to the packed weight; report this")
    return np.ascontiguousarray(encoded).reshape(-1)
