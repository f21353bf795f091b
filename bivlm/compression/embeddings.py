"""The embedding of tokens and the head: large tables, rounded to 8 or 4 bits, a few rows at a time.

In a current 7B model they are a seventh of all weights; beside two-bit linear layers, 16-bit tables are most of the
file. They are not among the recipe's components: every row is rounded to nearest on its own grids.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch

from bivlm.checkpoint.linears import Anatomy, Linear
from bivlm.checkpoint.safetensors_file import TensorEntry, tensor_rows
from bivlm.compression.layer import LayerBits, LayerRecord
from bivlm.errors import InputError
from bivlm.packing import grouped, open_packed, unpack_rows
from bivlm.recipe.embeddings import EmbeddingSettings, RecipeEmbeddings

PIECE_WEIGHTS = 1 << 24  # read and rounded at a time


def chosen_tables(
    parts: Anatomy, settings: RecipeEmbeddings | None, compressed: Iterable[Linear]
) -> list[tuple[Linear, EmbeddingSettings]]:
    """Return the embeddings and head that a recipe packs, with settings; a tied pair is one, named as the embedding.

    Raises `InputError` if the model lacks one, if a tied head has settings other than the embedding's, and if the
    recipe also compresses the head as a linear layer.
    """
    if settings is None:
        return []
    found = []
    head = next((linear for linear in parts.linears if linear.name == parts.head), None)
    tied = head is not None and head.tied_to is not None
    if settings.tokens is not None:
        if parts.tokens is None:
            raise InputError("recipe: tables.tokens: the model has no embedding of tokens that is one tensor on disk")
        found.append((parts.tokens, settings.tokens))
    if settings.head is not None and not (tied and settings.head == settings.tokens):
        if head is None:
            raise InputError("recipe: tables.head: the model has no linear layer that gives the logits")
        if tied:
            raise InputError(
                f"recipe: tables.head: {head.name} shares its tensor with {head.tied_to}; say it at tables.tokens"
            )
        if any(linear.name == head.name for linear in compressed):
            raise InputError(f"recipe: tables.head: {head.name} is compressed as a linear layer, too; add it to 'keep'")
        found.append((head, settings.head))
    return found


def pack_table(entry: TensorEntry, settings: EmbeddingSettings, file: Path, sha256: str | None = None) -> LayerRecord:
    """Write the packed table to `file`; the record is measured on what its bytes rebuild.

    Beside a piece of the table no more than the packed bytes is in memory. Raises `InputError` naming the tensor for
    weights that are not finite as they are or as they are rebuilt, and for bytes that are not those of `sha256`.
    """
    rows, columns = entry.shape
    count = max(1, PIECE_WEIGHTS // columns)

    def pieces() -> Iterator[torch.Tensor]:
        for piece in tensor_rows(entry, count, sha256):
            if not all(math.isfinite(end) for end in piece.aminmax()):
                raise InputError(f"{entry.name}: has NaN or infinite weights")
            yield piece

    grouped.pack_rows(file, pieces, (rows, columns), settings.bits, settings.group_size)
    packed = torch.from_numpy(np.fromfile(file, dtype=np.uint8))
    codec, header = open_packed(packed, f"{entry.name}, packed at {settings.bits} bits")
    error, total, begin = 0.0, 0.0, 0
    for piece in tensor_rows(entry, count):
        numbers = torch.arange(begin, begin + len(piece))
        lost = piece.to(torch.float32) - unpack_rows(packed, numbers, entry.name).to(torch.float32)
        error += float(lost.square_().sum(dtype=torch.float64))
        total += float(piece.to(torch.float32).square_().sum(dtype=torch.float64))
        begin += len(piece)
    bits, size = codec.bits(packed, header), entry.numel
    return LayerRecord(
        error=error / total if total else 0.0,
        bits=LayerBits(nominal=bits.nominal / size, entropy=bits.entropy / size, stored=bits.stored / size),
        nbytes=packed.numel(),
    )
