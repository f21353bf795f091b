"""``bivlm evaluate``: a checkpoint on a benchmark, alone or against another one on the same questions."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from bivlm.checkpoint.reading import Checkpoint
from bivlm.errors import InputError
from bivlm.evaluation.benchmark import Benchmark, load_benchmark
from bivlm.evaluation.chance import at_chance
from bivlm.evaluation.generation import load_model
from bivlm.evaluation.outcomes import Evaluation, evaluate, write_outcomes
from bivlm.evaluation.paired import loss_between
from bivlm.pruning.dropping import carried_pruning, pruned_if
from bivlm.workspace.hashing import digest
from bivlm.workspace.stores.folder import writable_folder
from bivlm.workspace.stores.location import cache_folder


def evaluate_folders(
    model: Path,
    task: str,
    *,
    limit: int | None = None,
    against: Path | None = None,
    pruned: bool = False,
    batch_size: int | None = None,
) -> dict[str, Any]:
    """Return the record of `Evaluation` with ``model`` and ``outcomes``, the parquet file of the answers.

    With `against` there are also ``against``, the record of that checkpoint, ``loss``, what `model` lost against it on
    the same questions (`bivlm.evaluation.paired.Loss`), ``chance`` in percent (None where it is unknown), and
    ``at_chance``, the record of `AtChance` if that checkpoint is not above chance. With `pruned`, `model` drops tokens
    as it says it may. Progress is shown on stderr where that is a terminal. Raises `InputError`.
    """
    if batch_size is not None and batch_size < 1:
        raise InputError(f"batch size: found {batch_size}, expected 1 or more")
    benchmark = load_benchmark(task, limit)
    pruning = carried_pruning(model.resolve()) if pruned else None
    if pruned and pruning is None:
        raise InputError(f"{model}: carries no pruning setting; leave --pruned out")
    for folder in (model, against) if against is not None else (model,):
        Checkpoint.open(folder)  # before the other one has answered for hours
    before = _evaluate(against, benchmark, None, batch_size) if against is not None else None
    result, record = _evaluate(model, benchmark, pruning, batch_size)
    if before is not None:
        chance = benchmark.chance()
        found = at_chance({task: before[1]}, {task: chance}, str(against))
        record |= {
            "against": before[1],
            "loss": asdict(loss_between(before[0].outcomes, result.outcomes)),
            "chance": chance,
            "at_chance": [each.model_dump() for each in found],
        }
    return record


def _evaluate(
    folder: Path, benchmark: Benchmark, pruning: Any, batch_size: int | None
) -> tuple[Evaluation, dict[str, Any]]:
    place = folder.resolve()
    # The path's hash keeps apart folders of one name, such as OUT.
    stem = f"{place.name}-{digest(str(place))[:8]}-{benchmark.name}-{benchmark.digest[:8]}"
    if pruning is not None:
        stem = f"{stem}-{digest(pruning.model_dump(mode='json'))[:8]}"
    files = writable_folder(cache_folder() / "outcomes", "BIVLM_CACHE")
    model, processor = load_model(folder)
    modules = Checkpoint.open(folder).modules
    with _bar(f"{place.name} on {benchmark.task}", len(benchmark)) as bar, pruned_if(model, pruning, modules):
        (row,) = bar.task_ids
        result = evaluate(
            model, processor, benchmark, batch_size=batch_size, progress=lambda done, _: bar.update(row, completed=done)
        )
    outcomes = write_outcomes(result.outcomes, files / f"{stem}.parquet")
    return result, {"model": str(folder), **result.record(), "outcomes": str(outcomes)}


def _bar(description: str, questions: int) -> Progress:
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    bar = Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal)
    bar.add_task(description, total=questions)
    return bar
