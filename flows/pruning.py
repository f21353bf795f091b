"""Pruning sweeps, and how many image tokens can be dropped: flows for any checkpoint, packed or not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import groupby
from typing import Any

from prefect import flow
from pydantic import ValidationError
from rich.console import Console

from bivlm.checkpoint.architectures import Modules
from bivlm.checkpoint.outputs import is_of_sweep
from bivlm.checkpoint.reading import Checkpoint
from bivlm.errors import InputError
from bivlm.evaluation.benchmark import Benchmark, load_benchmark
from bivlm.evaluation.chance import AtChance, at_chance
from bivlm.evaluation.metrics import accuracy
from bivlm.evaluation.paired import Loss
from bivlm.pruning.redundancy import find_redundancy
from bivlm.recipe.pruning import PruningSettings, SweepSettings
from bivlm.reports.table_folders import check_tables, write_tables
from bivlm.sources.models import resolve_model
from bivlm.workspace.garbage import in_use
from bivlm.workspace.places import Place, check_places, output_folder
from bivlm.workspace.steps import Workspace
from bivlm.workspace.stores.location import default_workspace
from flows.progress import FlowProgress
from tasks import evaluation, pruning
from tasks.pruning import ALL, Subject
from tasks.runtime.device import Device, choose_device
from tasks.runtime.naming import model_name
from tasks.runtime.progress import shown_by
from tasks.runtime.steps import Figures, StepResult
from tasks.tracking.sweeps import log_sweep


@flow(name="prune-sweep", flow_run_name="prune-sweep-{output}", persist_result=False)
def sweep_flow(
    models: list[str],
    benchmarks: list[str],
    sweep: dict[str, Any],
    output: str,
    revision: str | None = None,
    workspace: str | None = None,
    quiet: bool = False,
    modules: Modules | None = None,
) -> dict[str, Any]:
    """Prune every one of `models` (folders or hub ids) in every cell of `sweep` and ask it the `benchmarks`.

    `sweep` is as `bivlm.recipe.pruning.SweepSettings`. The folder `output` gets all rows as ``sweep.csv``, the paper's
    tables in ``tables/``, ``losses.svg`` and ``accuracy.svg``. A killed sweep resumes at its cell.
    `modules` name the parts of models that bivlm does not know, see `bivlm.checkpoint.architectures.parse_modules`.
    Returns ``{"output", "rows", "adaptive", "baselines", "at_chance", "run_id"}``. Raises `InputError` for anything the
    caller can correct, such as layers out of range, before the first question is asked.
    """
    settings = parse_sweep(sweep)
    place = output_folder(output)
    check_places([Place("output", place, written=True)], models, workspace)
    is_ours = partial(is_of_sweep, below="")
    check_tables(place, is_ours, pruning.NAMES)
    store = Workspace.open(workspace or default_workspace())
    asked = {name: evaluation.open_benchmark(name, settings.questions) for name in benchmarks}
    if not asked:
        raise InputError("benchmarks: found none, expected at least one")
    device, subjects = choose_device(), [subject_of(model, revision, modules) for model in models]
    if len({subject.label for subject in subjects}) < len(subjects):
        raise InputError(f"models: two are called alike ({', '.join(s.label for s in subjects)}); rename their folders")
    stages = questions_of_sweep(settings, asked.values(), len(subjects))
    progress = FlowProgress(stages, Console(stderr=True, quiet=quiet), "pruning sweep")
    with in_use(store), progress, shown_by(progress):
        limit = settings.questions
        swept = sweep_all(subjects, settings, benchmarks, limit, device, store.url, progress.publish)
    files = pruning.files_of_sweep(swept.rows, swept.adaptive, swept.baselines)
    write_tables(place, files, is_ours)
    warnings = [str(AtChance(**each)) for each in swept.at_chance]
    run_id = log_sweep(swept.rows, str(place), list(files), store.url, warnings=warnings)
    return {"output": str(place), **vars(swept), "run_id": run_id}


@flow(name="redundancy", flow_run_name="redundancy-{model}", persist_result=False)
def redundancy_flow(
    model: str,
    benchmarks: list[str],
    tolerance: float,
    cells: list[dict[str, Any]],
    questions: int | None = None,
    revision: str | None = None,
    workspace: str | None = None,
    modules: Modules | None = None,
) -> list[dict[str, Any]]:
    """Find for each of `cells` (`PruningSettings` without a share) the largest share that can be dropped.

    `tolerance` is in percentage points of accuracy: on each of the `benchmarks`, and on the questions of all together.
    Returns, for each cell and question set, the cell's settings and `bivlm.pruning.redundancy.Redundancy` ready for
    JSON, with the set's name as ``"task"``, a sentence in ``"in_words"``, and in ``"at_chance"`` the records of the
    set's benchmarks on which the model is at chance without pruning: nothing can be lost there.
    """
    store = Workspace.open(workspace or default_workspace())
    device, subject = choose_device(), subject_of(model, revision, modules)
    sets = {name: [name] for name in benchmarks} | ({ALL: benchmarks} if len(benchmarks) > 1 else {})
    with in_use(store), evaluation.models_let_go():
        for given in cells:
            pruning.check_cells(subject, [PruningSettings(**given, share=0.5)])
        plain = {
            name: evaluation.evaluate_checkpoint(subject.folder, subject.sha256, name, questions, device, store.url)
            for name in benchmarks
        }

        def measure(given: dict[str, Any], names: list[str], share: float) -> Loss | None:
            cell = PruningSettings(**given, share=share)
            (found,) = pruning.prune_cells(subject, [cell], names, questions, device, store.url)
            return pruning.loss_of({name: plain[name] for name in names}, found, store.url)

        results, unfit = [], _at_chance(plain, questions, subject.label)
        for given in cells:
            for task, names in sets.items():
                found = find_redundancy(partial(measure, given, names), tolerance)
                said = {"in_words": found.in_words(), "at_chance": [each for each in unfit if each["task"] in names]}
                results.append({**given, "task": task, **asdict(found), **said})
        return results


@dataclass(frozen=True)
class SweepResult:
    """The result of a sweep.

    Attributes:
        rows: of every cell, see `tasks.pruning.rows_of`.
        adaptive: of every adaptive cell, see `tasks.pruning.adaptive_row`.
        baselines: accuracies without pruning, by model and benchmark.
        at_chance: records of `AtChance`, of every model and benchmark without pruning.
    """

    rows: list[Figures]
    adaptive: list[Figures]
    baselines: dict[str, dict[str, float]]
    at_chance: list[Figures]


def questions_of_sweep(settings: SweepSettings, benchmarks: Iterable[Benchmark], models: int) -> dict[str, int]:
    """Return how many questions are asked, by stage: of the models as they are, and in their cells."""
    asked = models * sum(min(len(each), settings.questions or len(each)) for each in benchmarks)
    cells = len(settings.cells()) + 2 * len(settings.adaptive_cells())
    return {evaluation.STAGE: asked, pruning.STAGE: asked * cells}


def sweep_all(
    subjects: Sequence[Subject],
    settings: SweepSettings,
    benchmarks: Sequence[str],
    limit: int | None,
    device: Device,
    workspace: str,
    publish: Callable[[], None],
) -> SweepResult:
    """Evaluate every cell of every model: one model after the other, a task for each place, score and layer."""
    cells, adaptive = settings.cells(), settings.adaptive_cells()
    swept = SweepResult([], [], {}, [])

    def prune(subject: Subject, some: list[PruningSettings]) -> list[dict[str, StepResult]]:
        found = pruning.prune_cells(subject, some, benchmarks, limit, device, workspace)
        publish()
        return found

    with evaluation.models_let_go():
        for subject in subjects:
            pruning.check_cells(subject, [*cells, *adaptive])
        for subject in subjects:
            plain: dict[str, StepResult] = {}
            for name in benchmarks:
                plain[name] = evaluation.evaluate_checkpoint(
                    subject.folder, subject.sha256, name, limit, device, workspace
                )
                publish()
            found: list[Mapping[str, StepResult]] = []
            for _, chunk in groupby(cells, key=lambda cell: (cell.place, cell.score, cell.layer)):
                found += prune(subject, list(chunk))
            swept.rows.extend(pruning.rows_of(subject, cells, found, plain, workspace))
            for cell in adaptive:
                (chosen,) = prune(subject, [cell])
                share = 1 - pruning.kept_on_average(chosen)
                (fixed,) = prune(subject, [cell.model_copy(update={"mass": None, "share": share})])
                swept.adaptive.append(pruning.adaptive_row(subject, cell, plain, chosen, fixed, workspace))
            swept.baselines[subject.label] = _baseline(plain)
            swept.at_chance.extend(_at_chance(plain, limit, subject.label))
    return swept


def _baseline(plain: Mapping[str, StepResult]) -> dict[str, float]:
    """Return accuracy by benchmark, and that over the questions of all of them."""
    figures = {name: done.record.figures for name, done in plain.items()}
    found = {name: each["metrics"]["accuracy"] for name, each in figures.items()}
    scores = [each["metrics"]["accuracy"] / 100 for each in figures.values() for _ in range(each["n"])]
    return found | ({ALL: accuracy(scores)} if len(found) > 1 else {})


def _at_chance(plain: Mapping[str, StepResult], limit: int | None, model: str) -> list[Figures]:
    """Return records of the benchmarks on which a model is not above chance before anything is pruned."""
    levels = {name: load_benchmark(name, limit).chance() for name in plain}
    found = at_chance({name: done.record.figures for name, done in plain.items()}, levels, model)
    return [each.model_dump() for each in found]


def parse_sweep(sweep: dict[str, Any]) -> SweepSettings:
    """Return the settings in `sweep`; raises `InputError` naming the key."""
    try:
        return SweepSettings.model_validate(sweep)
    except ValidationError as error:
        lines = [f"  {'.'.join(map(str, each['loc'])) or '(sweep)'}: {each['msg']}" for each in error.errors()]
        raise InputError("\n".join(["sweep is not valid:", *lines])) from None


def subject_of(model: str, revision: str | None = None, modules: Modules | None = None) -> Subject:
    """Return a checkpoint by folder or hub id; `modules` name its parts where bivlm does not know them."""
    resolved = resolve_model(model, revision)
    return Subject(model_name(resolved), str(resolved.folder), Checkpoint.open(resolved.folder).digest(), modules)
