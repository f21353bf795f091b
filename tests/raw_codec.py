"""A codec for tests: the top byte of every bfloat16 weight, stored as it is."""

from collections.abc import Callable, Iterable

import numpy as np
import torch

from bivlm import packing
from bivlm.checkpoint.linears import Linear
from bivlm.checkpoint.reading import Checkpoint
from bivlm.packing import Codec, FormatBits, Tunable, container


class TopByte(Codec):
    """Keeps the sign and the exponent but its last bit, so that a packed model differs from its base."""

    name = "top-byte"

    def check(self, contents):
        contents.lengths({"top bytes": contents.size})
        return float(torch.finfo(torch.bfloat16).max)

    def unpack(self, packed, header):
        begin, end = header.sections[0]
        words = packed[begin:end].to(torch.int32) << 8
        return words.to(torch.uint16).view(torch.bfloat16).reshape(header.shape).to(header.dtype)

    def tunable(self, packed, header):
        weight = self.unpack(packed, header).float()
        return Tunable({}, lambda _: weight)

    def retuned(self, packed, header, parameters):
        return packed

    def bits(self, packed, header):
        weights = header.shape[0] * header.shape[1]
        return FormatBits(nominal=8.0 * weights, entropy=7.5 * weights, stored=8 * len(packed))


packing._codecs.cache_clear()


def pack_raw(weight: torch.Tensor) -> torch.Tensor:
    """The packed weight of a bfloat16 matrix."""
    words = weight.contiguous().view(torch.uint16).numpy()
    return container.write("top-byte", tuple(weight.shape), torch.bfloat16, [(words >> 8).astype(np.uint8).reshape(-1)])


def pack_linears(checkpoint: Checkpoint, linears: Iterable[Linear]) -> dict[str, Callable[[], torch.Tensor]]:
    """What makes the packed weight of each linear layer of a checkpoint, by the layer's name."""
    return {linear.name: (lambda name=linear.disk_name: pack_raw(checkpoint.read(name))) for linear in linears}


def top_bytes(weight: torch.Tensor) -> torch.Tensor:
    """What `pack_raw` keeps of a bfloat16 matrix, computed on integers."""
    words = weight.contiguous().view(torch.int16).to(torch.int32) & 0xFF00
    return words.to(torch.int16).view(torch.bfloat16)
