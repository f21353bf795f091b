"""A step: looked up in the workspace by its key, run if it is not done there, and written down."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from bivlm.workspace import StepRecord, Workspace


@dataclass(frozen=True)
class Done:
    """A finished step: its key, its record, and whether it had been done before. A few kilobytes; it travels."""

    key: str
    record: StepRecord
    reused: bool


@lru_cache(maxsize=8)
def open_workspace(url: str) -> Workspace:
    """The workspace at `url`, opened once a process."""
    return Workspace.open(url)


def do_step(workspace: Workspace, stage: str, key: str, work: Callable[[Path], dict[str, Any]]) -> Done:
    """The step `key`, from the workspace or by running ``work(folder)``.

    `work` writes what it makes as files in the folder, whose relative paths become the names of the outputs, and
    returns figures ready for JSON. Nothing is recorded unless it returns.
    """
    record = workspace.step(key)
    if record is not None:
        return Done(key, record, reused=True)
    started = time.perf_counter()
    with workspace.scratch() as folder:
        figures = work(folder)
        outputs = workspace.put_folder(folder)
    record = StepRecord(stage=stage, outputs=outputs, figures=figures, seconds=time.perf_counter() - started)
    workspace.finish_step(key, record)
    return Done(key, record, reused=False)
