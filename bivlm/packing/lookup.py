"""Table look-up whose gradient is one pass over the symbols, for tables of a few entries."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch


@cache
def _function() -> type[torch.autograd.Function]:
    """Return the class, made on first use: to make it takes torch, which this package is imported without."""

    class Lookup(torch.autograd.Function):
        @staticmethod
        def forward(context: Any, table_S: torch.Tensor, symbols: torch.Tensor) -> torch.Tensor:
            context.save_for_backward(symbols)
            context.entries = len(table_S)
            return table_S[symbols.to(torch.int32)]

        @staticmethod
        def backward(context: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
            (symbols,) = context.saved_tensors
            weights = gradient.reshape(-1).double()
            counts = torch.bincount(symbols.reshape(-1), weights=weights, minlength=context.entries)
            return counts.to(gradient.dtype), None

    return Lookup


def lookup(table_S: torch.Tensor, symbols: torch.Tensor) -> torch.Tensor:
    """Return ``table[symbols]`` for uint8 `symbols` of any shape, differentiable in the table.

    torch's own gradient adds the entries up one by one.
    """
    return _function().apply(table_S, symbols)
