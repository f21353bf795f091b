"""The safetensors format: headers read strictly, files written tensor by tensor.

A file is an 8-byte little-endian length, a JSON header of that length, then the tensors without gaps. Reading here is
plain ``seek`` and ``readinto``: pages of a memory map would count as the process's memory until the kernel takes them
back. Writing streams, so that no more than one tensor is ever held; `safetensors.torch.save_file` needs all of them.

Format: https://huggingface.co/docs/safetensors#format
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from io import FileIO
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bivlm.errors import InputError
from bivlm.untrusted import Kind, open_file, parse_object, short

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
_HEADER = Kind(MAX_HEADER_BYTES)
_MAX_DIMENSIONS = 64  # torch's own limit
CHUNK_BYTES = 16 << 20
# torch's name of each dtype, and the bytes of a number. Headers are read without torch.
_DTYPES = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U64": ("uint64", 8),
    "U32": ("uint32", 4),
    "U16": ("uint16", 2),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
}


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies.

    Attributes:
        name: as in the file.
        file: the file that holds it.
        dtype: the format's name of the dtype, for example "BF16".
        shape: of the tensor.
        begin: offset of its first byte in the file.
        nbytes: its length.
        data_begin: offset of the file's data part, from which its header counts.
    """

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    nbytes: int
    data_begin: int

    @property
    def numel(self) -> int:
        """Number of entries of the tensor."""
        return prod(self.shape)

    @property
    def is_floating(self) -> bool:
        """Whether its entries are floating-point numbers."""
        return self.dtype.startswith(("F", "BF"))


def read_entries(file: Path) -> list[TensorEntry]:
    """Return the tensors of `file` in the order of its header.

    Raises `InputError` naming the file if it is absent, cut short, or no safetensors file.
    """
    with open_file(file) as stream:
        size = os.fstat(stream.fileno()).st_size
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise InputError(f"{file}: not a safetensors file or cut short ({size} bytes, header of {length})")
        header = parse_object(stream.read(length), f"{file}: its header is not a safetensors header", _HEADER)
    header.pop("__metadata__", None)
    try:
        entries = [_entry(name, record, file, data=8 + length) for name, record in header.items()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{file}: its header is not a safetensors header ({error!r})") from None
    _check_layout(entries, file, begin=8 + length, end=size)
    return entries


def read_tensor(entry: TensorEntry, sha256: str | None = None) -> torch.Tensor:
    """Return the tensor, alone in memory.

    Raises `InputError` naming it for an unknown dtype, a file that ends early, or bytes that are not those of `sha256`
    (as `digest_file` gives it).
    """
    dtype = torch_dtype(entry)
    raw = torch.empty(entry.nbytes, dtype=torch.uint8)
    _fill(raw.numpy(), entry)
    if sha256 is not None:
        found = tensor_hash(entry.dtype, entry.shape)
        found.update(raw.numpy().data)
        _check_hash(entry, sha256, found)
    return raw.view(dtype).reshape(entry.shape)


def read_raw(entry: TensorEntry) -> np.ndarray:
    """Return the tensor's bytes, uint8 (nbytes,); raises `InputError` naming it if the file ends early."""
    raw = np.empty(entry.nbytes, np.uint8)
    _fill(raw, entry)
    return raw


def torch_dtype(entry: TensorEntry) -> torch.dtype:
    """Return torch's dtype of a tensor; raises `InputError` naming it for an unknown dtype."""
    if entry.dtype not in _DTYPES:
        known = ", ".join(_DTYPES)
        raise InputError(f"{entry.name} in {entry.file}: dtype {entry.dtype}, readable are {known}")
    return getattr(torch, _DTYPES[entry.dtype][0])


def tensor_rows(entry: TensorEntry, count: int, sha256: str | None = None) -> Iterator[torch.Tensor]:
    """Yield the tensor `count` rows at a time, each piece alone in memory; raises as `read_tensor`, at the end.

    A piece is overwritten by the next.
    """
    dtype = torch_dtype(entry)
    row = entry.nbytes // entry.shape[0]
    buffer = torch.empty(min(count, entry.shape[0]) * row, dtype=torch.uint8)
    found = tensor_hash(entry.dtype, entry.shape)
    with entry.file.open("rb", buffering=0) as stream:
        stream.seek(entry.begin)
        for begin in range(0, entry.shape[0], count):
            raw = buffer[: min(count, entry.shape[0] - begin) * row]
            _read_into(stream, raw.numpy().data, entry)
            if sha256 is not None:
                found.update(raw.numpy().data)
            yield raw.view(dtype).view(-1, *entry.shape[1:])
    _check_hash(entry, sha256, found)


def same_values(one: TensorEntry, other: TensorEntry) -> bool:
    """Return whether two tensors hold the same numbers in the same shape; a few rows of each are in memory at a time.

    Raises as `read_tensor`.
    """
    if one.shape != other.shape:
        return False
    if not one.shape or not one.numel:
        return torch.equal(read_tensor(one).double(), read_tensor(other).double())
    count = max(1, CHUNK_BYTES * one.shape[0] // one.nbytes)
    pieces = zip(tensor_rows(one, count), tensor_rows(other, count), strict=True)
    return all(torch.equal(mine.double(), its.double()) for mine, its in pieces)


def digest_file(file: Path, entries: Iterable[TensorEntry]) -> tuple[str, dict[str, str]]:
    """Return sha256 of the file's bytes, and of each of its tensors by name (`tensor_hash`), in one read.

    `entries` are all of the file's tensors; there is nothing but its header before the first and between them.
    """
    of_file = hashlib.sha256()
    of_tensors = {}
    ordered = sorted(entries, key=lambda entry: entry.begin)
    with file.open("rb") as stream:
        of_file.update(stream.read(ordered[0].data_begin if ordered else -1))
    for entry in ordered:
        of_tensor = tensor_hash(entry.dtype, entry.shape)
        for chunk in tensor_chunks(entry):
            of_file.update(chunk)
            of_tensor.update(chunk)
        of_tensors[entry.name] = of_tensor.hexdigest()
    return of_file.hexdigest(), of_tensors


def tensor_hash(dtype: str, shape: Sequence[int]) -> hashlib._Hash:
    """Return the beginning of a tensor's sha256: dtype (the format's name) and shape; its bytes are to follow."""
    return hashlib.sha256(f"{dtype} {'x'.join(map(str, shape))}\n".encode())


def tensor_chunks(entry: TensorEntry) -> Iterator[memoryview]:
    """Yield the tensor's bytes, a few megabytes at a time."""
    buffer = memoryview(bytearray(min(CHUNK_BYTES, max(entry.nbytes, 1))))
    with entry.file.open("rb", buffering=0) as stream:
        stream.seek(entry.begin)
        left = entry.nbytes
        while left:
            chunk = buffer[: min(left, len(buffer))]
            _read_into(stream, chunk, entry)
            left -= len(chunk)
            yield chunk


def header_text(name: str, dtype: str, shape: Sequence[int], begin: int, end: int) -> str:
    """Return a tensor's entry as it stands in a header: ``"name":{...},`` with offsets into the data part."""
    record = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    return f"{_compact(name)}:{_compact(record)},"


@dataclass(frozen=True)
class OutgoingTensor:
    """A tensor to be written: `chunks` is called once, when its turn comes, and yields `nbytes` bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    chunks: Callable[[], Iterable[bytes | memoryview]]


def outgoing(entry: TensorEntry) -> OutgoingTensor:
    """Return a tensor of a file as one to be written to another, byte for byte; raises as `torch_dtype`."""
    torch_dtype(entry)
    return OutgoingTensor(entry.name, entry.dtype, entry.shape, entry.nbytes, partial(tensor_chunks, entry))


def outgoing_tensor(name: str, tensor: torch.Tensor) -> OutgoingTensor:
    """Return a tensor in memory as one to be written; its dtype is one of the format's."""
    dtype = next(key for key, (torch_name, _) in _DTYPES.items() if getattr(torch, torch_name) == tensor.dtype)
    stored = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return OutgoingTensor(name, dtype, tuple(tensor.shape), stored.numel(), lambda: [stored.numpy().data])


def file_order(tensors: Iterable[OutgoingTensor]) -> list[OutgoingTensor]:
    """Return wide dtypes first, then by name: every tensor begins at a multiple of its item size, as in the library."""
    return sorted(tensors, key=lambda tensor: (-_DTYPES[tensor.dtype][1], tensor.name))


def write_tensors(file: Path, tensors: Sequence[OutgoingTensor]) -> None:
    """Write a safetensors file of `tensors` in the order given, one at a time, and flush it to the disk.

    Raises `InputError` as `file_chunks`.
    """
    with file.open("xb") as stream:
        for chunk in file_chunks(tensors):
            stream.write(chunk)
        stream.flush()
        os.fsync(stream.fileno())


def file_chunks(tensors: Sequence[OutgoingTensor]) -> Iterator[bytes | memoryview]:
    """Yield the bytes of a safetensors file of `tensors` in the order given, a few megabytes at a time.

    The same tensors give the same bytes. Raises `InputError` naming a tensor that yields another number of bytes than
    it announced.
    """
    texts, offset = ['"__metadata__":{"format":"pt"},'], 0
    for tensor in tensors:
        texts.append(header_text(tensor.name, tensor.dtype, tensor.shape, offset, offset + tensor.nbytes))
        offset += tensor.nbytes
    header = "{" + "".join(texts).removesuffix(",") + "}"
    encoded = header.encode("utf-8")
    encoded += b" " * (-len(encoded) % 8)
    yield len(encoded).to_bytes(8, "little") + encoded
    for tensor in tensors:
        came = 0
        for chunk in tensor.chunks():
            came += len(chunk)
            yield chunk
        if came != tensor.nbytes:
            raise InputError(f"{tensor.name}: {came} bytes came, {tensor.nbytes} were announced")


def _check_hash(entry: TensorEntry, expected: str | None, found: hashlib._Hash) -> None:
    if expected is not None and found.hexdigest() != expected:
        raise InputError(
            f"{entry.name} in {entry.file}: other bytes than when the checkpoint was opened (sha256 "
            f"{found.hexdigest()}, expected {expected}); do not change it while it is compressed"
        )


def _compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def _entry(name: str, record: dict[str, Any], file: Path, data: int) -> TensorEntry:
    begin, end = record["data_offsets"]
    shape = record["shape"]
    if not isinstance(shape, list) or len(shape) > _MAX_DIMENSIONS or not isinstance(record["dtype"], str):
        raise ValueError(f"{name}: dtype {short(record['dtype'])} and shape {short(shape)}")
    if not all(type(number) is int and number >= 0 for number in (begin, end, *shape)):
        raise ValueError(f"{name}: offsets {short(record['data_offsets'])} and shape {short(shape)}")
    entry = TensorEntry(name, file, record["dtype"], tuple(shape), data + begin, end - begin, data)
    _, itemsize = _DTYPES.get(entry.dtype, ("", None))
    # Of a dtype that is not known, a number takes a bit or more.
    if entry.numel > 8 * entry.nbytes or (itemsize is not None and entry.nbytes != entry.numel * itemsize):
        raise ValueError(f"{name}: {entry.nbytes} bytes for {entry.dtype} of shape {short(entry.shape)}")
    return entry


def _check_layout(entries: list[TensorEntry], file: Path, begin: int, end: int) -> None:
    position = begin
    for entry in sorted(entries, key=lambda entry: (entry.begin, entry.nbytes)):
        if entry.begin != position or entry.nbytes < 0:
            raise InputError(f"{file}: tensor {entry.name} begins at byte {entry.begin}, expected {position}")
        position += entry.nbytes
        if position > end:
            raise InputError(f"{file}: cut short: tensor {entry.name} ends at byte {position} of {end}")
    if position != end:
        raise InputError(f"{file}: {end - position} bytes after the last tensor")


def _fill(raw: np.ndarray, entry: TensorEntry) -> None:
    with entry.file.open("rb", buffering=0) as stream:
        stream.seek(entry.begin)
        _read_into(stream, raw.data, entry)


def _read_into(stream: FileIO, target: memoryview, entry: TensorEntry) -> None:
    # One read returns at most 2 GiB on Linux, so a long tensor takes several.
    done = 0
    while done < len(target):
        count = stream.readinto(target[done:])
        if not count:
            raise InputError(f"{entry.name}: {entry.file} ends {len(target) - done} bytes early")
        done += count
