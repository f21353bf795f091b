"""The module that stands where a packed weight was a `torch.nn.Linear`."""

from __future__ import annotations

import copy

import torch
from torch import nn

from bivlm.errors import InputError
from bivlm.packing import open_packed, unpack, unpack_rows


class PackedLinear(nn.Module):
    """``y = x W^T + b`` with W in its packed bytes; every call rebuilds W, uses it and drops it.

    Attributes:
        weight: uint8 (bytes,), the packed weight, see `bivlm.packing`. A parameter, so that it is saved, moved and
            counted as the weight it is; no cast changes it, because it holds no floating-point numbers.
        bias: (M,) or None.
        name: the module's name in the model, for messages.
        dtype: of the ordinary layer that `dequantized` makes.
    """

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
        """An empty one; `nbytes` is the length of the packed weight."""
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.name = name
        self.dtype = dtype
        empty = torch.empty(nbytes, dtype=torch.uint8, device=device)
        self.weight = nn.Parameter(empty, requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype, device=device)) if bias else None

    @classmethod
    def replacing(cls, linear: nn.Linear, nbytes: int, name: str) -> PackedLinear:
        """An empty one for the place of `linear`, on its device."""
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
    def size(self) -> int:
        """Number of weights, M * N."""
        return self.in_features * self.out_features

    def verify(self) -> None:
        """Raise `InputError` naming the tensor if it is damaged or the weight of a layer of another shape."""
        _verify(self.weight.data, (self.out_features, self.in_features), f"{self.name}.weight")

    def unpacked(self) -> torch.Tensor:
        """The weight W (M, N) in the dtype it was packed from. The checksum is `verify`'s business."""
        return unpack(self.weight.data, f"{self.name}.weight", check=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., N) to (..., M), computed in the dtype of `x`."""
        return nn.functional.linear(x, self.unpacked().to(x.dtype), self.bias)

    def dequantized(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """An ordinary layer with W in `dtype` (by default this layer's) and this layer's bias."""
        return self.with_weight(nn.Parameter(self.unpacked().to(dtype or self.dtype)))

    def with_weight(self, weight: nn.Parameter) -> nn.Linear:
        """An ordinary layer with this weight (M, N) and this layer's bias."""
        with torch.device("meta"):
            linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None)
        linear.weight = weight
        linear.bias = self.bias
        return linear.train(self.training)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"packed_bytes={self.weight.numel()}"
        )


class PackedEmbedding(nn.Module):
    """A look-up table with its rows in packed bytes; every call rebuilds the rows that it looks up.

    What else the layer in its place does, for example to scale the rows, its own code goes on doing.

    Attributes:
        weight: uint8 (bytes,), the packed weight (V, D); as in `PackedLinear`.
        name: the module's name in the model, for messages.
        dtype: of the rows that come out.
    """

    def __init__(self, embedding: nn.Embedding, nbytes: int, name: str):
        """An empty one for the place of `embedding`, on its device; `nbytes` is the length of the packed weight."""
        super().__init__()
        self.num_embeddings, self.embedding_dim = embedding.num_embeddings, embedding.embedding_dim
        self.name = name
        self.dtype = embedding.weight.dtype
        empty = torch.empty(nbytes, dtype=torch.uint8, device=embedding.weight.device)
        self.weight = nn.Parameter(empty, requires_grad=False)
        self.embedding = embedding
        self.padding_idx = embedding.padding_idx
        del embedding.weight
        # Code that fills new weights finds one, and no row of padding in it.
        embedding.weight = torch.empty(0, self.embedding_dim, dtype=self.dtype)
        embedding.padding_idx = None

    @property
    def size(self) -> int:
        """Number of weights, V * D."""
        return self.num_embeddings * self.embedding_dim

    def verify(self) -> None:
        """Raise `InputError` naming the tensor if it is damaged or of another shape."""
        _verify(self.weight.data, (self.num_embeddings, self.embedding_dim), f"{self.name}.weight")

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Rows of these numbers, (...) to (..., D)."""
        found, places = input.unique(return_inverse=True)
        rows = unpack_rows(self.weight.data, found, f"{self.name}.weight").to(self.dtype)
        # The padding's row matters to gradients alone, and its number is one of the whole table.
        return self._with(rows, padding_idx=None)(places)

    def dequantized(self, dtype: torch.dtype | None = None) -> nn.Embedding:
        """The ordinary layer with the whole table in `dtype` (by default this layer's)."""
        rows = unpack(self.weight.data, f"{self.name}.weight", check=False).to(dtype or self.dtype)
        return self._with(rows, self.padding_idx)

    def _with(self, rows: torch.Tensor, padding_idx: int | None) -> nn.Embedding:
        embedding = copy.copy(self.embedding)
        del embedding.__dict__["weight"]
        embedding._parameters = {"weight": nn.Parameter(rows, requires_grad=False)}
        embedding.padding_idx = padding_idx
        return embedding


def _verify(packed: torch.Tensor, shape: tuple[int, int], name: str) -> None:
    _, header = open_packed(packed, name)
    if header.shape != shape:
        raise InputError(f"{name}: packed weight of shape {header.shape}, the layer's is {shape}")
