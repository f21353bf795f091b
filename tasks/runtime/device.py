"""Where models run, and the slot that keeps two of them off one GPU."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from bivlm.workspace.locks import one_at_a_time
from bivlm.workspace.stores.location import cache_folder


@dataclass(frozen=True)
class Device:
    """`place` is what torch calls it ("cpu", "cuda"), `kind` what enters keys: results differ between kinds.

    `unit` tells the GPUs of one kind apart.
    """

    place: str
    kind: str
    unit: str = ""


def choose_device() -> Device:
    """The GPU if there is one, else the CPU."""
    if torch.cuda.is_available():
        return Device("cuda", torch.cuda.get_device_name(), str(torch.cuda.get_device_properties(0).uuid))
    return Device("cpu", "cpu")


@contextmanager
def gpu_slot(device: Device) -> Iterator[None]:
    """Hold the GPU within this block, waiting for whoever holds it; nothing is held on the CPU.

    A lock of this machine, not a limit of Prefect's server: a GPU belongs to a machine, and a killed run lets go of a
    lock at once. A limit on the server stays taken until its lease runs out, and for ever where a temporary server died
    with the run.
    """
    if device.place == "cpu":
        yield
        return
    name = re.sub(r"[^\w.-]+", "-", f"gpu-{device.kind}-{device.unit}")
    with one_at_a_time(cache_folder() / "locks" / f"{name}.lock"):
        yield
