"""Packed tables: the embedding of tokens and the head, each in one step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefect import task

from bivlm.checkpoint.linears import Linear
from bivlm.checkpoint.reading import Checkpoint
from bivlm.compression.embeddings import chosen_tables, pack_table
from bivlm.recipe.embeddings import EmbeddingSettings
from bivlm.recipe.loading import Recipe
from bivlm.workspace.hashing import step_identity
from tasks.binarization import FILE
from tasks.checkpoint import Base
from tasks.runtime.policy import OVER_NETWORK
from tasks.runtime.progress import advance
from tasks.runtime.steps import StepResult, do_step, open_workspace

STAGE = "tables"
VERSION = 1


@dataclass(frozen=True)
class Table:
    """One table on its way to its packed bytes: where it lies, what it is, its sha256, and how it is rounded."""

    folder: str
    linear: Linear
    weight_sha256: str
    settings: EmbeddingSettings

    @property
    def name(self) -> str:
        return self.linear.name


def tables_of(base: Base, recipe: Recipe, compressed: Sequence[Linear]) -> list[Table]:
    """The tables that the recipe packs; raises `InputError` as `bivlm.compression.embeddings.chosen_tables`."""
    return [
        Table(str(base.model.folder), linear, base.digests.tensors[linear.disk_name], settings)
        for linear, settings in chosen_tables(base.parts, recipe.tables, compressed)
    ]


@task(name="tables", task_run_name="tables-{table.name}", **OVER_NETWORK)
def pack_one(table: Table, workspace: str) -> StepResult:
    """The packed table; a few rows of it are in memory at a time."""
    settings = table.settings.model_dump(mode="json")
    identity = step_identity(STAGE, VERSION, {"weight": table.weight_sha256}, settings, exact=True)

    def pack(folder: Path) -> dict[str, Any]:
        entry = Checkpoint.open(table.folder).entries[table.linear.disk_name]
        return pack_table(entry, table.settings, folder / FILE, table.weight_sha256).model_dump(mode="json")

    done = do_step(open_workspace(workspace), identity, pack)
    advance(STAGE)
    return done
