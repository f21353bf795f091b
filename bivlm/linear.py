"""The module that stands where a packed weight was a `torch.nn.Linear`."""

from __future__ import annotations

import torch
from torch import nn

from bivlm.errors import InputError
from bivlm.packing import open_packed, unpack


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

    def verify(self) -> None:
        """Raise `InputError` naming the tensor if it is damaged or the weight of a layer of another shape."""
        tensor = f"{self.name}.weight"
        _, header = open_packed(self.weight.data, tensor)
        if header.shape != (self.out_features, self.in_features):
            raise InputError(
                f"{tensor}: packed weight of shape {header.shape}, the layer's is "
                f"{(self.out_features, self.in_features)}"
            )

    def unpacked(self) -> torch.Tensor:
        """The weight W (M, N) in the dtype it was packed from. The checksum is `verify`'s business."""
        return unpack(self.weight.data, f"{self.name}.weight", check=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., N) to (..., M), computed in the dtype of `x`."""
        return nn.functional.linear(x, self.unpacked().to(x.dtype), self.bias)

    def dequantized(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """An ordinary layer with W in `dtype` (by default this layer's) and this layer's bias."""
        with torch.device("meta"):
            linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None)
        linear.weight = nn.Parameter(self.unpacked().to(dtype or self.dtype))
        linear.bias = self.bias
        return linear.train(self.training)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"packed_bytes={self.weight.numel()}"
        )
