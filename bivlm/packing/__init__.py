"""Bits on disk: a packed weight is one self-describing ``uint8`` tensor (`container`), its contents are a codec's.

A codec is a module of this package with a `Codec` subclass; it registers itself by being there.
"""

from __future__ import annotations

import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from functools import cache
from typing import ClassVar, Literal, TypeAlias

import torch

from bivlm.errors import InputError
from bivlm.kernels import gpu
from bivlm.packing import container
from bivlm.packing.container import Bytes, Header
from bivlm.packing.contents import Contents

Activations = Literal["float32", "int8"]  # what inputs are in a product


@dataclass(frozen=True)
class FormatBits:
    """The cost of a packed weight, in bits for the whole tensor (not per weight).

    `nominal` is the count of the method's own paper, for comparison: Bi-VLM's (24)-(26) leaves out the index;
    `entropy` is the least that any decodable code of this format could store; `stored` is 8 x the bytes of the packed
    tensor.
    """

    nominal: float
    entropy: float
    stored: int


@dataclass(frozen=True)
class Tunable:
    """A packed weight as a function of its scales and levels, its symbols fixed.

    Attributes:
        parameters: float32 tensors by name, as they are stored.
        rebuild: the weight (M, N), float32, of such tensors; differentiable in them.
    """

    parameters: dict[str, torch.Tensor]
    rebuild: Callable[[dict[str, torch.Tensor]], torch.Tensor]


@dataclass(frozen=True)
class Integers:
    """A packed weight as ``(stride * code - zero) * scale``: an exact product, then rounded to the weight's dtype.

    Attributes:
        codes: returns the codes of some rows, uint8 (m, N), by their numbers, int64 (m,).
        largest: no code is above it.
        stride: the distance of two codes next to each other, in scales.
        scales_MG: float32 (M, G).
        zeros_MG: uint8 (M, G).
        width: columns of a group; the last group of a row may have fewer.
    """

    codes: Callable[[torch.Tensor], torch.Tensor]
    largest: int
    stride: int
    scales_MG: torch.Tensor
    zeros_MG: torch.Tensor
    width: int


GpuProduct: TypeAlias = "Callable[[torch.Tensor], torch.Tensor]"


class Codec(ABC):
    """How one kind of contents is laid out in the sections of a packed weight."""

    name: ClassVar[str]  # at most 8 ASCII characters

    @abstractmethod
    def check(self, contents: Contents) -> float:
        """Return a magnitude that no rebuilt weight exceeds.

        Raises `InputError` naming the tensor unless its contents are ones that this codec's `pack` could have written:
        lengths are those that shape and parameters need, numbers are finite, and what counts, points or permutes does
        so within the weight. The other methods trust contents that were checked. It needs no torch.
        """

    def unpack(self, packed: torch.Tensor, header: Header) -> torch.Tensor:
        """Return the rebuilt weight (M, N), dtype `header.dtype`, on the device of `packed`."""
        opened = self.tunable(packed, header)
        return opened.rebuild(opened.parameters).to(header.dtype)

    def rows(self, packed: torch.Tensor, header: Header, rows_m: torch.Tensor) -> torch.Tensor:
        """Return the rebuilt rows (m, N) of these numbers, int64 (m,); by default taken from the whole weight."""
        return self.unpack(packed, header)[rows_m]

    def integers(self, packed: torch.Tensor, header: Header) -> Integers | None:
        """Return the weight as integers and scales of groups; None if it is no such weight."""
        return None

    def multiplies(self, packed: torch.Tensor, header: Header) -> bool:
        """Return whether this machine can multiply by this weight straight from its bytes, see `product`."""
        return False

    def side_table(self, packed: torch.Tensor, header: Header) -> torch.Tensor:
        """Return what `product` reads beside the packed bytes, uint8 (bytes,): made once, small, and stored nowhere."""
        return torch.empty(0, dtype=torch.uint8, device=packed.device)

    def product(
        self,
        packed: torch.Tensor,
        header: Header,
        side_table: torch.Tensor,
        x_TN: torch.Tensor,
        activations: Activations = "float32",
    ) -> torch.Tensor:
        """Return ``x W^T``, float32 (T, M), straight from the packed bytes, for a codec that `multiplies`.

        x is float32 (T, N) on the CPU, and so are levels and sums: W is not rounded to `header.dtype`. With
        `activations` of int8, x may be rounded to that, with a scale for every few columns.
        """
        raise NotImplementedError

    def gpu_product(self, packed: torch.Tensor, header: Header, side_table: torch.Tensor) -> GpuProduct:
        """Return `product` for a weight on a GPU, as a function of x alone, float32, float16 or bfloat16 (T, N).

        All that is read of the bytes for the host's sake is read here, once: it waits for the GPU.
        """
        raise NotImplementedError

    @abstractmethod
    def tunable(self, packed: torch.Tensor, header: Header) -> Tunable:
        """Return scales and levels, and the weight as a function of them; rounded to `header.dtype` it is what `unpack`
        gives."""

    @abstractmethod
    def retuned(self, packed: torch.Tensor, header: Header, parameters: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the packed weight with other `parameters`, rounded to what the format stores; of the same length."""

    @abstractmethod
    def bits(self, packed: Bytes, header: Header) -> FormatBits:
        """Return nominal, entropy and stored bits, counted from the packed bytes; like `check`, without torch."""


@cache
def _codecs() -> dict[str, Codec]:
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return {codec.name: codec() for codec in Codec.__subclasses__()}


def open_packed(packed: Bytes, name: str = "packed weight", *, check: bool = True) -> tuple[Codec, Header]:
    """Return the codec and header of `packed`.

    Checksum and contents are checked, and that every rebuilt weight is finite, unless `check` is false. Raises
    `InputError` naming `name`.
    """
    header = container.read_header(packed, name)
    codec = _codecs().get(header.codec)
    if codec is None:
        raise InputError(f"{name}: unknown codec {header.codec!r}; this code knows {', '.join(sorted(_codecs()))}")
    if check:
        contents = Contents(container.as_array(packed), header, name)
        container.verify(contents.packed, header, name)
        if not codec.check(contents) <= header.largest:
            # The bound is a coarse one: the weights themselves decide.
            finite = bool(codec.unpack(torch.from_numpy(contents.packed), header).isfinite().all())
            contents.require(finite, f"a rebuilt weight is NaN or infinite in {header.dtype}, expected finite weights")
    return codec, header


def unpack(packed: torch.Tensor, name: str = "packed weight", *, check: bool = True) -> torch.Tensor:
    """Rebuild the weight (M, N) from its packed bytes, uint8 of shape (bytes,); raises `InputError` naming `name`."""
    codec, header = open_packed(packed, name, check=check)
    return codec.unpack(packed, header)


def unpack_rows(packed: torch.Tensor, rows_m: torch.Tensor, name: str = "packed weight") -> torch.Tensor:
    """Rebuild some rows (m, N) of a weight, by their numbers, int64 (m,), on the device of `packed`; no checksum."""
    codec, header = open_packed(packed, name, check=False)
    return codec.rows(packed, header, rows_m)


def integers(packed: torch.Tensor, name: str = "packed weight") -> Integers | None:
    """Return the weight as integers and scales of groups, see `Integers`; None if it is no such weight. No checksum."""
    codec, header = open_packed(packed, name, check=False)
    return codec.integers(packed, header)


def side_table(packed: torch.Tensor, name: str = "packed weight") -> torch.Tensor | None:
    """Return what `product` reads beside the bytes, uint8 (bytes,); None if it cannot be had here. No checksum."""
    codec, header = open_packed(packed, name, check=False)
    return codec.side_table(packed, header) if codec.multiplies(packed, header) else None


def product(
    packed: torch.Tensor,
    side_table: torch.Tensor,
    x_TN: torch.Tensor,
    name: str = "packed weight",
    activations: Activations = "float32",
) -> torch.Tensor:
    """Return ``x W^T``, float32 (T, M), of float32 x (T, N), of a weight that has a `side_table`; no checksum.

    With `activations` of int8, x may be rounded to that (`Codec.product`). On a GPU x may be float16 or bfloat16, too,
    and is not rounded; what is read of the bytes there is kept as long as the side table.
    """
    if gpu.on_gpu(packed.device):
        return _gpu_product(packed, side_table, name)(x_TN)
    codec, header = open_packed(packed, name, check=False)
    if x_TN.ndim != 2 or x_TN.shape[1] != header.shape[1]:  # native code would read beside it
        raise InputError(f"{name}: inputs of shape {tuple(x_TN.shape)}, expected (tokens, {header.shape[1]})")
    return codec.product(packed, header, side_table, x_TN, activations)


def _gpu_product(packed: torch.Tensor, side_table: torch.Tensor, name: str) -> GpuProduct:
    place = (packed.data_ptr(), len(packed))
    products = _gpu_products()
    found = products.get(side_table)
    if found is None or found[0] != place:
        codec, header = open_packed(packed, name, check=False)
        found = products[side_table] = place, codec.gpu_product(packed.data, header, side_table.data)
    return found[1]


@cache
def _gpu_products() -> MutableMapping[torch.Tensor, tuple[tuple[int, int], GpuProduct]]:
    """Return products of weights by their side tables, made on first use: `bits` needs no torch."""
    from torch.utils.weak import WeakTensorKeyDictionary

    return WeakTensorKeyDictionary()


def format_bits(packed: Bytes, name: str = "packed weight") -> FormatBits:
    """Return nominal, entropy and stored bits of a packed weight; raises `InputError` naming `name`."""
    codec, header = open_packed(packed, name)
    return codec.bits(packed, header)
