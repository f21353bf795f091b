"""The device that models run on, the slot that keeps two of them off one GPU, and the model held between tasks."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from threading import RLock
from typing import Generic, TypeVar

import torch

from bivlm.workspace.locks import one_at_a_time
from bivlm.workspace.stores.location import cache_folder

M = TypeVar("M")


@dataclass(frozen=True)
class Device:
    """A CPU or GPU: `place` is torch's name ("cpu", "cuda"), `unit` tells the GPUs of one kind apart.

    `kind` is part of steps' keys, because results differ between kinds.
    """

    place: str
    kind: str
    unit: str = ""


def choose_device() -> Device:
    """Return the GPU if there is one, else the CPU."""
    if torch.cuda.is_available():
        return Device("cuda", torch.cuda.get_device_name(), str(torch.cuda.get_device_properties(0).uuid))
    return Device("cpu", "cpu")


@contextmanager
def gpu_slot(device: Device) -> Iterator[None]:
    """Hold the GPU within this block, after waiting for its holder; does nothing on the CPU.

    It is a lock of this machine, not a limit of Prefect's server: a GPU belongs to a machine, and a killed run releases
    a lock at once. A limit on the server stays taken until its lease runs out, or forever if a temporary server died
    with the run.
    """
    if device.place == "cpu":
        yield
        return
    name = re.sub(r"[^\w.-]+", "-", f"gpu-{device.kind}-{device.unit}")
    with one_at_a_time(cache_folder() / "locks" / f"{name}.lock"):
        yield


class HeldModel(Generic[M]):
    """At most one model, kept between the tasks of a run because loading takes seconds; `lock` is held to use it."""

    def __init__(self) -> None:
        self.lock = RLock()
        self._which: object = None
        self._model: M | None = None
        self._held = ExitStack()

    def get(self, which: object, load: Callable[[ExitStack], M]) -> M:
        """Return the model that `which` identifies; ``load(stack)`` loads it, its stack is closed by `clear`."""
        with self.lock:
            if self._which != which:
                self.clear()
                with ExitStack() as stack:
                    self._model, self._which = load(stack), which
                    self._held = stack.pop_all()
            return self._model

    def clear(self) -> None:
        """Forget the model, then close what it was loaded in: the GPU slot."""
        with self.lock:
            self._model = self._which = None
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self._held.close()
