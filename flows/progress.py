"""Show progress to people: rows in the terminal, one artifact in Prefect's UI."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Self
from uuid import UUID

from prefect.artifacts import create_link_artifact, create_progress_artifact, update_progress_artifact
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from tasks.runtime.policy import is_passing

ARTIFACT_KEY = "bivlm-compress"
PAGE_KEY = "bivlm-mlflow"  # the link from a flow run to what MLflow holds of it


class FlowProgress:
    """A bar in the terminal with a row per stage, and its total as a Prefect progress artifact.

    `stages` gives the number of units of every stage in their order. `advance` may be called from any thread;
    `publish` only from the flow, because it talks to Prefect's server.
    """

    def __init__(self, stages: dict[str, int], console: Console, description: str) -> None:
        self._bar = Progress(
            TextColumn("{task.description:<18}"),
            BarColumn(),
            MofNCompleteColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            console=console,
        )
        self._rows = {stage: self._bar.add_task(stage, total=units, start=False) for stage, units in stages.items()}
        self._lock = threading.Lock()
        self._description = description
        self._artifact: UUID | None = None
        self.publish()

    def advance(self, stage: str, units: float = 1.0) -> None:
        with self._lock:
            row = self._rows.get(stage)
            if row is None:
                return
            self._bar.start_task(row) if self._bar.tasks[row].start_time is None else None
            self._bar.advance(row, units)

    def expect(self, stage: str, units: int) -> None:
        with self._lock:
            if (row := self._rows.get(stage)) is not None:
                self._bar.update(row, total=units)

    def publish(self) -> None:
        """Publish the percentage of stages that are done, each stage counting alike.

        If Prefect's server or its database is away, the work continues without.
        """
        rows = self._bar.tasks
        done = sum(min(row.completed / row.total, 1.0) if row.total else 1.0 for row in rows)
        percent = 100.0 * done / len(rows)
        try:
            if self._artifact is None:
                self._artifact = create_progress_artifact(percent, key=ARTIFACT_KEY, description=self._description)
            else:
                update_progress_artifact(self._artifact, progress=percent)
        except Exception as error:
            if not is_passing(error):
                raise

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
        if kind is None:
            self.publish()


def publish_page(address: str) -> None:
    """Link the flow run's page to the one in MLflow; `flows.cli.follow` reads it there."""
    create_link_artifact(address, link_text="MLflow", key=PAGE_KEY, description=f"[{address}]({address})")
