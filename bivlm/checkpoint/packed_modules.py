"""Packed modules, in the place of a `torch.nn.Linear` or a `torch.nn.Embedding`.

Each computes what the ordinary layer with the rebuilt weight computes, in the layer's dtype. That dtype follows every
cast (``model.to(torch.float16)``), because an empty buffer that is in no state dict carries it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn

from bivlm.errors import InputError
from bivlm.packing import Activations, open_packed, product, side_table, unpack, unpack_rows

MOST_TOKENS = 256  # that are multiplied straight from the bytes: for more, rebuilding a weight pays


class PackedLinear(nn.Module):
    """``y = x W^T + b`` with W in its packed bytes; every call rebuilds W in the layer's dtype, uses it and drops it.

    After `go_straight`, up to `MOST_TOKENS` without gradients are multiplied straight from the bytes, in float32, and
    rounded to the layer's dtype (`bivlm.packing.product`). A layer that is moved asks its new device whether it can.

    Attributes:
        weight: uint8 (bytes,), the packed weight, see `bivlm.packing`. A parameter, so that it is saved, moved and
            counted as the weight it is; no cast changes it, because it holds no floating-point numbers.
        bias: (M,) or None.
        name: the module's name in the model, for messages.
        of_dtype: an empty buffer that carries the layer's dtype.
        side_table: uint8 (bytes,), a buffer beside the bytes for products straight from them, or None.
        activations: what inputs of those products are, "float32" or "int8" where there are such products.
        straight_on: the type of device that `go_straight` asked for them, or None.
    """

    of_dtype: torch.Tensor
    side_table: torch.Tensor | None
    straight_on: str | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        nbytes: int,
        *,
        bias: bool,
        name: str,
        dtype: torch.dtype,
        device: torch.device | None = None,
    ):
        """Make an empty layer; `nbytes` is the length of the packed weight."""
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.name = name
        self.straight_on = None
        self.register_buffer("of_dtype", torch.empty(0, dtype=dtype, device=device), persistent=False)
        self.register_buffer("side_table", None, persistent=False)
        self.activations: Activations = "float32"
        empty = torch.empty(nbytes, dtype=torch.uint8, device=device)
        self.weight = nn.Parameter(empty, requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype, device=device)) if bias else None

    @classmethod
    def replacing(cls, linear: nn.Linear, nbytes: int, name: str) -> PackedLinear:
        """Return an empty layer for the place of `linear`, on its device."""
        return cls(
            linear.in_features,
            linear.out_features,
            nbytes,
            bias=linear.bias is not None,
            name=name,
            dtype=linear.weight.dtype,
            device=linear.weight.device,
        )

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of inputs, outputs and of the ordinary layer that `dequantized` makes."""
        return self.of_dtype.dtype

    @property
    def size(self) -> int:
        """Number of weights, M * N."""
        return self.in_features * self.out_features

    def verify(self) -> None:
        """Raise `InputError` naming the tensor if it is damaged or the weight of a layer of another shape."""
        _verify(self.weight.data, (self.out_features, self.in_features), f"{self.name}.weight")

    def unpacked(self) -> torch.Tensor:
        """Return the weight W (M, N) in the dtype it was packed from. `verify` checks the checksum."""
        return unpack(self.weight.data, f"{self.name}.weight", check=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (..., N) to (..., M) as the ordinary layer in this dtype: autocast applies, other mixtures raise.

        Raises `InputError` for an `x` of integers: some models cast it to the dtype of the weight's bytes.
        """
        if not x.is_floating_point():
            raise InputError(
                f"{self.name}: an input of {x.dtype}: the model's code takes the packed bytes for the weight; load the "
                "checkpoint with dequantize 'load'"
            )
        shape = (self.out_features, self.in_features)
        if self.side_table is not None and self._is_a_few_tokens(x):
            rows_x = x.reshape(-1, self.in_features)
            name = f"{self.name}.weight"
            y = _product(rows_x, self.weight, self.side_table, self.out_features, name, self.activations)
            return (y if self.bias is None else y + self.bias).to(self.dtype).view(*x.shape[:-1], self.out_features)
        weight = _rebuilt(self.weight, *shape, self.dtype, f"{self.name}.weight")
        return nn.functional.linear(x, weight, self.bias)

    def go_straight(self, activations: Activations = "float32") -> None:
        """Multiply straight from the bytes from now on, where this machine can, and by int8 activations if it can."""
        self.activations = activations
        self.side_table = side_table(self.weight.data, f"{self.name}.weight")
        self.straight_on = self.weight.device.type

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> PackedLinear:
        super()._apply(fn, recurse)
        if self.straight_on not in (None, self.weight.device.type):
            if self.weight.is_meta:  # no bytes are there to be looked at
                self.straight_on = self.side_table = None
            else:
                self.go_straight(self.activations)
        return self

    def _load_from_state_dict(self, *given: Any, **named: Any) -> None:
        super()._load_from_state_dict(*given, **named)
        if self.straight_on is not None:  # what lies beside the bytes belongs to those that were there
            self.go_straight(self.activations)

    def _is_a_few_tokens(self, x: torch.Tensor) -> bool:
        device = x.device.type
        if x.dtype != self.dtype or device != self.straight_on or torch.is_autocast_enabled(device):
            return False
        return 0 < x.numel() <= MOST_TOKENS * self.in_features and not (torch.is_grad_enabled() and x.requires_grad)

    def dequantized(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """Return an ordinary layer with W and this layer's bias in `dtype` (by default this layer's)."""
        return self.with_weight(nn.Parameter(self.unpacked().to(dtype or self.dtype)))

    def with_weight(self, weight: nn.Parameter) -> nn.Linear:
        """Return an ordinary layer with this weight (M, N) and this layer's bias in the weight's dtype."""
        with torch.device("meta"):
            linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None)
        linear.weight = weight
        if self.bias is not None:
            linear.bias = self.bias
            if self.bias.dtype != weight.dtype:
                linear.bias = nn.Parameter(self.bias.to(weight.dtype), requires_grad=self.bias.requires_grad)
        return linear.train(self.training)

    def trim_bias(self) -> None:
        """Cut the bias to (M,): tying a weight, transformers pads the bias to the weight's first dimension."""
        if self.bias is not None:
            self.bias.data = self.bias.data[: self.out_features]

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"packed_bytes={self.weight.numel()}"
        )


class PackedEmbedding(nn.Module):
    """A look-up table with its rows in packed bytes; every call rebuilds the rows that it looks up.

    What else the layer in its place does, for example to scale the rows, its own code still does.

    Attributes:
        weight: uint8 (bytes,), the packed weight (V, D); as in `PackedLinear`.
        name: the module's name in the model, for messages.
        embedding: the layer in whose place it stands, with an empty table in the dtype of the rows that come out.
    """

    def __init__(self, embedding: nn.Embedding, nbytes: int, name: str):
        """Make an empty layer for the place of `embedding`, on its device; `nbytes` is the packed weight's length."""
        super().__init__()
        self.num_embeddings, self.embedding_dim = embedding.num_embeddings, embedding.embedding_dim
        self.name = name
        dtype = embedding.weight.dtype
        empty = torch.empty(nbytes, dtype=torch.uint8, device=embedding.weight.device)
        self.weight = nn.Parameter(empty, requires_grad=False)
        self.embedding = embedding
        self.padding_idx = embedding.padding_idx
        del embedding.weight
        # Code that fills new weights finds one, and no row of padding in it: that row's number is one of the whole
        # table, and matters to gradients alone. Casts move it.
        table = torch.empty(0, self.embedding_dim, dtype=dtype, device=empty.device)
        embedding.register_buffer("weight", table, persistent=False)
        embedding.padding_idx = None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the rows that come out."""
        return self.embedding.weight.dtype

    @property
    def size(self) -> int:
        """Number of weights, V * D."""
        return self.num_embeddings * self.embedding_dim

    def verify(self) -> None:
        """Raise `InputError` naming the tensor if it is damaged or of another shape."""
        _verify(self.weight.data, (self.num_embeddings, self.embedding_dim), f"{self.name}.weight")

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return rows of these numbers, (...) to (..., D); raises `IndexError` for a number that is no row's."""
        shape = (self.num_embeddings, self.embedding_dim)
        rows = _rebuilt_rows(self.weight, input.flatten(), *shape, self.dtype, f"{self.name}.weight")
        places = torch.arange(len(rows), device=rows.device).view(input.shape)
        embedding = copy.copy(self.embedding)
        embedding._buffers = {**self.embedding._buffers, "weight": rows}
        return embedding(places)

    def dequantized(self, dtype: torch.dtype | None = None) -> nn.Embedding:
        """Return the ordinary layer with the whole table in `dtype` (by default this layer's)."""
        rows = unpack(self.weight.data, f"{self.name}.weight", check=False).to(dtype or self.dtype)
        return self.with_weight(nn.Parameter(rows, requires_grad=False))

    def with_weight(self, weight: nn.Parameter) -> nn.Embedding:
        """Return the ordinary layer with this table (V, D)."""
        embedding = copy.copy(self.embedding)
        embedding._buffers = {key: buffer for key, buffer in self.embedding._buffers.items() if key != "weight"}
        embedding._non_persistent_buffers_set = self.embedding._non_persistent_buffers_set - {"weight"}
        embedding._parameters = {"weight": weight}
        embedding.padding_idx = self.padding_idx
        return embedding


# Operators, so that torch.compile puts a call into its graph and looks no further: codecs read headers with numpy.


@torch.library.custom_op("bivlm::rebuilt", mutates_args=())
def _rebuilt(packed: torch.Tensor, rows: int, columns: int, dtype: torch.dtype, name: str) -> torch.Tensor:
    return unpack(packed.data, name, check=False).to(dtype)


@_rebuilt.register_fake
def _(packed: torch.Tensor, rows: int, columns: int, dtype: torch.dtype, name: str) -> torch.Tensor:
    return packed.new_empty(rows, columns, dtype=dtype)


@torch.library.custom_op("bivlm::product", mutates_args=())
def _product(
    x_TN: torch.Tensor, packed: torch.Tensor, side: torch.Tensor, rows: int, name: str, activations: str
) -> torch.Tensor:
    wide = packed.device.type == "cpu" or x_TN.dtype == torch.float64
    x_TN = x_TN.to(torch.float32) if wide else x_TN
    return product(packed.data, side, x_TN, name, cast(Activations, activations))


@_product.register_fake
def _(
    x_TN: torch.Tensor, packed: torch.Tensor, side: torch.Tensor, rows: int, name: str, activations: str
) -> torch.Tensor:
    return x_TN.new_empty(x_TN.shape[0], rows, dtype=torch.float32)


@torch.library.custom_op("bivlm::rebuilt_rows", mutates_args=())
def _rebuilt_rows(
    packed: torch.Tensor, numbers: torch.Tensor, rows: int, columns: int, dtype: torch.dtype, name: str
) -> torch.Tensor:
    found, places = numbers.long().unique(return_inverse=True)
    if wrong := [number for number in found[[0, -1]].tolist() if not 0 <= number < rows] if len(found) else []:
        raise IndexError(f"{name}: row {wrong[0]} of a table of {rows}")
    return unpack_rows(packed.data, found, name).to(dtype)[places]


@_rebuilt_rows.register_fake
def _(
    packed: torch.Tensor, numbers: torch.Tensor, rows: int, columns: int, dtype: torch.dtype, name: str
) -> torch.Tensor:
    return packed.new_empty(numbers.shape[0], columns, dtype=dtype)


def _verify(packed: torch.Tensor, shape: tuple[int, int], name: str) -> None:
    _, header = open_packed(packed, name)
    if header.shape != shape:
        raise InputError(f"{name}: packed weight of shape {header.shape}, the layer's is {shape}")
