"""Look steps up in the workspace by key, run those that are not there, and record them."""

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

Identity = dict[str, Any]  # as `bivlm.workspace.hashing.step_identity` makes it
Figures = dict[str, Any]  # of a step, ready for JSON


@dataclass(frozen=True)
class StepResult:
    """A finished step: its record, and whether it was done before. A few kilobytes, small enough to travel."""

    record: StepRecord
    reused: bool

    @property
    def key(self) -> str:
        return self.record.key


@lru_cache(maxsize=8)
def open_workspace(url: str) -> Workspace:
    """Return the workspace at `url`, opened once per process.

    Raises `InputError` for a missing folder: the flow has made it, so this worker runs on a machine that does not share
    it, and no other machine would find what it writes.
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


def do_step(workspace: Workspace, identity: Identity, work: Callable[[Path], Figures]) -> StepResult:
    """Return the step of this identity, from the workspace or by running ``work(folder)``.

    `work` writes its outputs as files into the folder, whose relative paths become their names, and returns figures.
    Nothing is recorded unless it returns.
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
    workspace: Workspace, identity: Identity, outputs: dict[str, Reference], figures: Figures, seconds: float
) -> StepResult:
    """Record a step whose outputs are stored, and return it.

    If another worker recorded it meanwhile, that record stands, so that all users of the step name the same one.
    """
    record = StepRecord(identity=identity, outputs=outputs, figures=figures, seconds=seconds, environment=software())
    earlier = workspace.step(record.key)
    if earlier is not None and earlier.says_the_same_as(record):
        return StepResult(earlier, reused=False)
    workspace.finish_step(record)
    return StepResult(record, reused=False)
