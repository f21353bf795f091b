"""What a compression was asked to do, looked up and found to be in order."""

from __future__ import annotations

from dataclasses import dataclass

from bivlm.checkpoint.linears import Linear
from bivlm.evaluation.benchmark import Benchmark
from bivlm.recipe.loading import Recipe
from bivlm.workspace.steps import Workspace
from flows.runners import Runner
from tasks import checkpoint
from tasks import embeddings as tables
from tasks.runtime.device import Device


@dataclass(frozen=True)
class Request:
    """What is to be done: everything that the caller said, looked up and found to be in order."""

    base: checkpoint.Base
    recipe: Recipe
    chosen: list[Linear]
    tables: list[tables.Table]
    output: str
    store: Workspace
    benchmarks: dict[str, Benchmark]
    questions: int | None
    device: Device
    runner: Runner
    trigger: str
