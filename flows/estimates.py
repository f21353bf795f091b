"""Estimate what a compression needs on this machine: checked before each one, and printed by ``--estimate``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bivlm.checkpoint.linears import Anatomy, anatomy
from bivlm.checkpoint.reading import Checkpoint
from bivlm.checkpoint.writing import check_output
from bivlm.compression.embeddings import chosen_tables
from bivlm.compression.estimate import LIBRARIES, Machine, Work, check_fits, estimate, probe_all
from bivlm.errors import InputError
from bivlm.evaluation.benchmark import load_benchmark
from bivlm.methods import method
from bivlm.recipe.loading import Recipe, read_recipe
from bivlm.recipe.selection import select
from bivlm.sources.models import resolve_model
from bivlm.workspace.places import check_places, output_folder, output_place
from bivlm.workspace.steps import Workspace
from bivlm.workspace.stores.location import default_workspace
from flows.runners import Runner, parse_runner


def refuse_what_cannot_fit(
    checkpoint: Checkpoint, parts: Anatomy, recipe: Recipe, answers: int, runner: Runner, places: Iterable[Path]
) -> None:
    """Raise `InputError` with figures if a compression does not fit into memory, or onto the disks of `places`.

    Layers that a cluster works on do not count.
    """
    stages = estimate(_work(checkpoint, parts, recipe, answers), runner.workers)
    check_fits([each for each in stages if each.stage != "layers" or runner.address is None], Machine.here(), places)


def estimate_compression(
    model: str,
    recipe: str | dict[str, Any],
    output: str,
    *,
    revision: str | None = None,
    workspace: str | None = None,
    evaluate: bool = True,
    questions: int | None = None,
    runner: str = "threads",
    workers: int | None = None,
) -> dict[str, Any]:
    """Estimate what every stage needs, with the time of packing on this machine, and whether it fits; for JSON.

    ``{"stages": [{"stage", "memory", "gpu", "disk", "seconds"}], "memory", "disk", "refused"}`` in bytes and seconds;
    "memory" is the largest of the stages' with the libraries, "refused" the reason why it cannot be done here, or None.
    A model on the hub is downloaded; nothing else is written.
    """
    chosen_recipe, chosen_runner = read_recipe(recipe), parse_runner(runner, workers)
    names: Sequence[str] = chosen_recipe.evaluation if evaluate else ()
    check_places([output_place(output_folder(output))], [model], workspace, chosen_recipe.data())
    checkpoint = Checkpoint.open(resolve_model(model, revision).folder, chosen_recipe.modules)
    check_output(checkpoint, output)
    answers = 2 * sum(len(load_benchmark(name, questions)) for name in names)
    work = _work(checkpoint, anatomy(checkpoint), chosen_recipe, answers)
    stages = estimate(work, chosen_runner.workers, probe_all(work.layers))
    refused = None
    try:
        places = [Workspace.open(workspace or default_workspace()).local, Path(output).absolute()]
        check_fits(stages, Machine.here(), places)
    except InputError as error:
        refused = str(error)
    return {
        "stages": [asdict(each) for each in stages],
        "memory": LIBRARIES + max(each.memory for each in stages),
        "disk": sum(each.disk for each in stages),
        "refused": refused,
    }


def _work(checkpoint: Checkpoint, parts: Anatomy, recipe: Recipe, answers: int) -> Work:
    """Return what the recipe makes of the model; raises `InputError` if it does not fit the model."""
    chosen, _ = select(parts.linears, recipe)
    needs = {need for settings in recipe.components.values() for need in method(settings.method).needs(settings)}
    by_blocks = "inputs" in needs or recipe.budget is not None or recipe.search is not None
    parameters = sum(linear.size for linear in parts.linears if linear.tied_to is None)
    tables = chosen_tables(parts, recipe.tables, chosen)
    leftovers = parts.leftovers([*chosen, *(table for table, _ in tables)])
    tuned = recipe.finish is not None and recipe.finish.leftovers
    return Work(
        layers=[(linear, recipe.components[linear.component]) for linear in chosen],
        tables=[(table.size, settings.bits) for table, settings in tables],
        base_bytes=sum(file.stat().st_size for file in checkpoint.weight_files),
        parameters=parameters + sum(tensor.parameters for tensor in parts.left_alone),
        samples=recipe.calibration.samples if by_blocks else 0,
        finish=recipe.finish is not None,
        leftovers=sum(checkpoint.entries[name].numel for name in leftovers) if tuned else 0,
        answers=answers,
    )
