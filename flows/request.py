"""The request of a compression, looked up and checked before any work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bivlm.checkpoint.linears import Linear
from bivlm.evaluation.benchmark import Benchmark
from bivlm.recipe.loading import Recipe
from bivlm.recipe.pruning import PruningSettings, SweepSettings
from bivlm.recipe.selection import select
from bivlm.workspace.places import check_places, output_folder, output_place
from bivlm.workspace.steps import Workspace
from bivlm.workspace.stores.location import default_workspace
from flows.layers import needs_calibration
from flows.origin import trigger_of_run
from flows.runners import Runner
from tasks import checkpoint, evaluation
from tasks.embeddings import Embedding, embeddings_of
from tasks.layers import Layer, layers_of
from tasks.runtime.device import Device, choose_device


@dataclass(frozen=True)
class Request:
    """The caller's request, looked up and checked.

    Attributes:
        linears, layers: what is packed, as the checkpoint has it and as the stages take it.
        embeddings: what is packed besides.
        output: the absolute path of the output folder.
        benchmarks: by name; none if nothing is evaluated. `questions` limits each to its first questions.
        trigger: what requested it.
    """

    base: checkpoint.Base
    recipe: Recipe
    linears: list[Linear]
    layers: list[Layer]
    embeddings: list[Embedding]
    output: str
    store: Workspace
    benchmarks: dict[str, Benchmark]
    questions: int | None
    device: Device
    runner: Runner
    trigger: str

    @property
    def answers(self) -> int:
        """How many questions are asked, of both models together."""
        return 2 * sum(map(len, self.benchmarks.values()))

    @property
    def packed(self) -> list[Linear]:
        """The layers and embeddings that are packed."""
        return [*self.linears, *(embedding.linear for embedding in self.embeddings)]

    @property
    def needs_blocks(self) -> bool:
        """Whether the calibration samples run through the model's blocks."""
        return needs_calibration(self.layers, self.recipe)

    @property
    def pruning(self) -> PruningSettings | None:
        """What the packed model drops."""
        return self.recipe.pruning.setting if self.recipe.pruning else None

    @property
    def sweep(self) -> SweepSettings | None:
        return self.recipe.pruning.sweep if self.recipe.pruning and self.benchmarks else None


def prepare(
    model: str,
    recipe: Recipe,
    output: str,
    revision: str | None,
    workspace: str | None,
    benchmarks: Sequence[str],
    questions: int | None,
    runner: Runner,
    trigger: str | None,
) -> Request:
    """Return the request; the other arguments are those of `flows.compress.compress_flow`.

    Raises `InputError` for whatever the caller can correct, before any work is done.
    """
    output = str(output_folder(output))
    check_places([output_place(Path(output))], [model], workspace, recipe.data())
    store = Workspace.open(workspace or default_workspace())
    opened = {name: evaluation.open_benchmark(name, questions) for name in benchmarks}
    base = checkpoint.resolve_base(model, revision, output, recipe.modules)
    linears, _kept = select(base.linears, recipe)
    return Request(
        base=base,
        recipe=recipe,
        linears=linears,
        # Absolute, because workers on other machines look there, too.
        layers=layers_of(linears, recipe, str(base.model.folder.absolute()), base.digests.tensors),
        embeddings=embeddings_of(base, recipe, linears),
        output=output,
        store=store,
        benchmarks=opened,
        questions=questions,
        device=choose_device(),
        runner=runner,
        trigger=trigger_of_run(trigger),
    )
