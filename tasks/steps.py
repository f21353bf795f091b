"""A step: looked up in the workspace by its key, run if it is not done there, and written down."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from bivlm.environment import software
from bivlm.identity import digest
from bivlm.workspace import Reference, StepRecord, Workspace


@dataclass(frozen=True)
class Done:
    """A finished step: its record, and whether it had been done before. A few kilobytes; it travels."""

    record: StepRecord
    reused: bool

    @property
    def key(self) -> str:
        return self.record.key


@lru_cache(maxsize=8)
def open_workspace(url: str) -> Workspace:
    """The workspace at `url`, opened once a process."""
    return Workspace.open(url)


def do_step(workspace: Workspace, identity: dict[str, Any], work: Callable[[Path], dict[str, Any]]) -> Done:
    """The step of this identity (`step_identity`), from the workspace or by running ``work(folder)``.

    `work` writes what it makes as files in the folder, whose relative paths become the names of the outputs, and
    returns figures ready for JSON. Nothing is recorded unless it returns.
    """
    record = workspace.step(digest(identity))
    if record is not None:
        return Done(record, reused=True)
    started = time.perf_counter()
    with workspace.scratch() as folder:
        figures = work(folder)
        outputs = workspace.put_folder(folder)
    return finish(workspace, identity, outputs, figures, time.perf_counter() - started)


def finish(
    workspace: Workspace,
    identity: dict[str, Any],
    outputs: dict[str, Reference],
    figures: dict[str, Any],
    seconds: float,
) -> Done:
    """Write down that a step is done, whose outputs are stored."""
    record = StepRecord(identity=identity, outputs=outputs, figures=figures, seconds=seconds, environment=software())
    workspace.finish_step(record)
    return Done(record, reused=False)
