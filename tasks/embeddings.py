"""Packed embeddings: the embedding of tokens and the head (a recipe's `tables`), each in one step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from prefect import task

from bivlm.checkpoint.linears import Linear
from bivlm.checkpoint.reading import Checkpoint
from bivlm.compression.embeddings import chosen_tables, pack_table
from bivlm.recipe.embeddings import EmbeddingSettings
from bivlm.recipe.loading import Recipe
from bivlm.reports.lineage import TABLES_STAGE
from bivlm.workspace.hashing import step_identity
from tasks.binarization import FILE
from tasks.checkpoint import Base
from tasks.runtime.policy import OVER_NETWORK
from tasks.runtime.progress import advance
from tasks.runtime.steps import Figures, StepResult, do_step, open_workspace

STAGE = TABLES_STAGE
VERSION = 1


@dataclass(frozen=True)
class Embedding:
    """An embedding to pack: the base checkpoint's folder, the tensor, its sha256, and how it is rounded."""

    folder: str
    linear: Linear
    weight_sha256: str
    settings: EmbeddingSettings

    @property
    def name(self) -> str:
        return self.linear.name


def embeddings_of(base: Base, recipe: Recipe, compressed: Sequence[Linear]) -> list[Embedding]:
    """Return the embeddings that the recipe packs; raises `InputError` as `chosen_tables`."""
    return [
        Embedding(str(base.model.folder), linear, base.digests.tensors[linear.disk_name], settings)
        for linear, settings in chosen_tables(base.parts, recipe.tables, compressed)
    ]


@task(name="tables", task_run_name="tables-{embedding.name}", **OVER_NETWORK)
def pack_embedding(embedding: Embedding, workspace: str) -> StepResult:
    """Pack one embedding, a few rows in memory at a time."""
    settings = embedding.settings.model_dump(mode="json")
    identity = step_identity(STAGE, VERSION, {"weight": embedding.weight_sha256}, settings, exact=True)

    def pack(folder: Path) -> Figures:
        entry = Checkpoint.open(embedding.folder).entries[embedding.linear.disk_name]
        record = pack_table(entry, embedding.settings, folder / FILE, embedding.weight_sha256)
        return record.model_dump(mode="json")

    done = do_step(open_workspace(workspace), identity, pack)
    advance(STAGE)
    return done
