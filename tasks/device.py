"""Where models run, and the slots that keep two of them off one GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate
from prefect.concurrency.sync import concurrency
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound

GPU_SLOT = "bivlm-gpu"


@dataclass(frozen=True)
class Device:
    """`place` is what torch calls it ("cpu", "cuda"), `kind` what enters keys: results differ between kinds."""

    place: str
    kind: str


def choose_device() -> Device:
    """The GPU if there is one, else the CPU."""
    if torch.cuda.is_available():
        return Device("cuda", torch.cuda.get_device_name())
    return Device("cpu", "cpu")


def provide_gpu_slot(device: Device) -> None:
    """Make sure that the limit `GPU_SLOT` exists where a GPU is used; a limit that somebody has set stays as it is."""
    if device.place == "cpu":
        return
    with get_client(sync_client=True) as client:
        try:
            client.read_global_concurrency_limit_by_name(GPU_SLOT)
        except ObjectNotFound:
            try:
                client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=GPU_SLOT, limit=1))
            except ObjectAlreadyExists:
                return


@contextmanager
def gpu_slot(device: Device) -> Iterator[None]:
    """Hold the GPU while a model is on it; nothing is held on the CPU."""
    if device.place == "cpu":
        yield
        return
    with concurrency(GPU_SLOT, occupy=1, strict=True):
        yield
