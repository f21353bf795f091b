"""A step: looked up in the workspace by its key, run if it is not done there, and written down."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from bivlm.errors import InputError
from bivlm.workspace.environment import software
from bivlm.workspace.hashing import digest
from bivlm.workspace.steps import Reference, StepRecord, Workspace


@dataclass(frozen=True)
class StepResult:
    """A finished step: its record, and whether it had been done before. A few kilobytes; it travels."""

    record: StepRecord
    reused: bool

    @property
    def key(self) -> str:
        return self.record.key


@lru_cache(maxsize=8)
def open_workspace(url: str) -> Workspace:
    """The workspace at `url`, opened once a process.

    Raises `InputError` for a folder that is not there. The flow has made it, so that this worker is on another machine
    that does not share it; what it made in a new one would never be found.
    """
    if "://" not in url and not Path(url).is_dir():
        raise InputError(
            f"workspace {url}: no such folder on {socket.gethostname()}; every worker needs the same one at the same "
            "path: share it, or use s3://bucket/prefix"
        )
    return Workspace.open(url)


def check_that_workers_share(workspace: Workspace, steps: Iterable[StepResult]) -> None:
    """Raise `InputError` if what a worker says it has made is not in the workspace as this process sees it."""
    for done in steps:
        for name, reference in done.record.outputs.items():
            if not workspace.has(reference):
                raise InputError(
                    f"workspace {workspace.url}: a worker has made {name!r} ({done.record.stage}), which is not there; "
                    "its folder of that name, or its S3 server, is another one"
                )


def do_step(workspace: Workspace, identity: dict[str, Any], work: Callable[[Path], dict[str, Any]]) -> StepResult:
    """The step of this identity (`step_identity`), from the workspace or by running ``work(folder)``.

    `work` writes what it makes as files in the folder, whose relative paths become the names of the outputs, and
    returns figures ready for JSON. Nothing is recorded unless it returns.
    """
    record = workspace.step(digest(identity))
    if record is not None:
        return StepResult(record, reused=True)
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
) -> StepResult:
    """Write down that a step is done, whose outputs are stored.

    Another worker may have finished it meanwhile: its record stands, so that all who use the step name the same one.
    """
    record = StepRecord(identity=identity, outputs=outputs, figures=figures, seconds=seconds, environment=software())
    earlier = workspace.step(record.key)
    if earlier is not None and earlier.says_the_same_as(record):
        return StepResult(earlier, reused=False)
    workspace.finish_step(record)
    return StepResult(record, reused=False)
