"""Statistics of the inputs of a site's linear layers over the calibration samples.

A site is one or more linear layers that read the same tensor: q, k and v share one, gate and up share one.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from bivlm.errors import InputError

VERSION = 1


@dataclass(frozen=True)
class SiteStatistics:
    """Input statistics of a site with N channels, over all calibration tokens, weighted by their g.

    Attributes:
        second_moment_NN: float32 (N, N), ``H = sum_t g_t^2 x_t x_t^T / sum_t g_t^2``; zero where no token was seen.
        mean_N: float32 (N,), the weighted mean of x.
        magnitude_N: float32 (N,), the weighted mean of ``abs(x)``.
        tokens: how many tokens were seen, by modality ("image", "text").
        gradient_square_MN: float32 (M, N), of the one layer that is asked about: ``sum_t s_ti^2 x_tj^2``, the squared
            gradients of its weights, see `bivlm.calibration.blocks.gradients`; None unless a method needs "gradients".
        gradient_moment_MM: float32 (M, M), of the one layer that is asked about: ``sum_t s_t s_t^T``, the second moment
            of its outputs' gradients; None unless a method needs "moments".
    """

    second_moment_NN: torch.Tensor
    mean_N: torch.Tensor
    magnitude_N: torch.Tensor
    tokens: dict[str, int]
    gradient_square_MN: torch.Tensor | None = None
    gradient_moment_MM: torch.Tensor | None = None

    @property
    def total_tokens(self) -> int:
        """Tokens of all modalities."""
        return sum(self.tokens.values())

    def is_finite(self) -> bool:
        """Return whether no statistic is NaN or infinite; squares of large inputs may exceed float32."""
        tensors = (self.second_moment_NN, self.mean_N, self.magnitude_N)
        return all(bool(extreme.isfinite()) for tensor in tensors for extreme in tensor.aminmax())

    def save(self, path: str | Path) -> None:
        """Write to a safetensors file; the same statistics give the same bytes."""
        tensors = {
            "second_moment": self.second_moment_NN.contiguous(),
            "mean": self.mean_N.contiguous(),
            "magnitude": self.magnitude_N.contiguous(),
        }
        counts = ",".join(f"{name}={count}" for name, count in sorted(self.tokens.items()))
        # One entry: several are written in an order that differs from process to process.
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()}, path, {"site": f"{VERSION} {counts}"}
        )

    @classmethod
    def load(cls, path: str | Path) -> SiteStatistics:
        """Read what `save` wrote; raises `InputError` for another version."""
        with safe_open(path, framework="pt") as file:
            version, _, counts = (file.metadata() or {}).get("site", "").partition(" ")
            if version != str(VERSION):
                raise InputError(f"{path}: input statistics version {version!r}, expected {VERSION}")
            tokens = dict(pair.split("=") for pair in counts.split(",") if pair)
            return cls(
                second_moment_NN=file.get_tensor("second_moment"),
                mean_N=file.get_tensor("mean"),
                magnitude_N=file.get_tensor("magnitude"),
                tokens={name: int(count) for name, count in tokens.items()},
            )
