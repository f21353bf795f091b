"""Where GPU products run: the kernels in `triton_planes` and `triton_trellis` are imported only where `on_gpu` says so.

Triton comes with torch's CUDA builds. This package does not depend on it.
"""

from __future__ import annotations

import importlib.util
from contextlib import AbstractContextManager
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_PROGRAMS = 256  # of one product: below that, columns are shared out among more of them
_OLDEST = (8, 0)  # compute capability: matrix instructions for tf32. Nothing was compiled for AMD's GPUs


def on_gpu(device: torch.device) -> bool:
    """Return whether products straight from packed bytes run on this device."""
    return device.type == "cuda" and _has_triton() and _can_run(device)


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@cache
def _can_run(device: torch.device) -> bool:
    import torch

    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= _OLDEST


def device_of(tensor: torch.Tensor) -> AbstractContextManager[object]:
    """Return a context in which kernels start on the device of `tensor`."""
    import torch

    return torch.cuda.device_of(tensor)


def parts_of_columns(steps: int, together: int, programs: int) -> int:
    """Return how many of the `steps` along a row one program takes, a multiple of `together`.

    `programs` is the number of programs of whole rows. Which GPU it is does not matter, so sums have the same order on
    all of them.
    """
    blocks = -(-steps // together)
    parts = max(1, min(_PROGRAMS // programs, blocks // 2))
    return -(-blocks // parts) * together
