"""Pruned models: every cell of a sweep on every benchmark, a step each, and the tables made of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from prefect import task

from bivlm.checkpoint.architectures import MODULES_KEY, Modules
from bivlm.checkpoint.linears import skeleton
from bivlm.checkpoint.reading import Checkpoint
from bivlm.errors import InputError
from bivlm.evaluation.benchmark import load_benchmark
from bivlm.evaluation.generation import default_batch_size
from bivlm.evaluation.metrics import accuracy, bootstrap_interval
from bivlm.evaluation.outcomes import evaluate, write_outcomes
from bivlm.evaluation.paired import Loss, loss_between
from bivlm.pruning.dropping import pruned
from bivlm.recipe.pruning import PruningSettings
from bivlm.reports.figures.pruning import accuracy_by_share, loss_maps
from bivlm.reports.figures.style import svg
from bivlm.reports.pruning_tables import as_table, grid
from bivlm.workspace.hashing import step_identity
from bivlm.workspace.steps import Workspace
from tasks.evaluation import OUTCOMES_FILE, loaded_model, outcomes_of
from tasks.runtime.device import Device
from tasks.runtime.naming import slug
from tasks.runtime.policy import OVER_NETWORK, smaller_after_out_of_memory
from tasks.runtime.progress import advance
from tasks.runtime.steps import Figures, StepResult, do_step, open_workspace

STAGE = "pruning"
VERSION = 1
ALL = "all"  # the questions of all benchmarks together


@dataclass(frozen=True)
class Subject:
    """A checkpoint whose tokens are pruned: its label, folder and hash.

    `modules` are those of a recipe, for full precision of an architecture that bivlm does not know; a packed
    checkpoint carries its own.
    """

    label: str
    folder: str
    sha256: str
    modules: Modules | None = None

    def open(self) -> Checkpoint:
        """Open the checkpoint, headers alone."""
        return Checkpoint.open(self.folder, self.modules)


@task(name="check-cells", **OVER_NETWORK)
def check_cells(subject: Subject, cells: Sequence[PruningSettings]) -> None:
    """Raise `InputError` for a cell that the model does not have, before hours are spent on the others."""
    checkpoint = subject.open()
    model = skeleton(checkpoint)
    for cell in {(cell.place, cell.layer): cell for cell in cells}.values():
        with pruned(model, cell, checkpoint.modules):
            pass


@task(name="prune", task_run_name="prune-{cells[0].place}-{cells[0].layer}", **OVER_NETWORK)
def prune_cells(
    subject: Subject,
    cells: list[PruningSettings],
    benchmarks: Sequence[str],
    limit: int | None,
    device: Device,
    workspace: str,
) -> list[dict[str, StepResult]]:
    """Evaluate every cell by benchmark: figures as of an evaluation and ``kept``, the shares of tokens kept.

    A cell that leaves a prompt no image token has ``refused``, the reason, instead.
    """
    store = open_workspace(workspace)
    return [{name: _prune(subject, cell, name, limit, device, store) for name in benchmarks} for cell in cells]


def _prune(
    subject: Subject, cell: PruningSettings, benchmark: str, limit: int | None, device: Device, store: Workspace
) -> StepResult:
    questions = load_benchmark(benchmark, limit)
    inputs = {"checkpoint": subject.sha256, "benchmark": questions.digest}
    part = {"task": benchmark, "cell": cell.model_dump(mode="json")}
    part |= {MODULES_KEY: subject.modules} if subject.modules else {}
    identity = step_identity(STAGE, VERSION, inputs, part, exact=False, device=device.kind)

    def ask(place: Path) -> Figures:
        model, processor = loaded_model(subject.folder, subject.sha256, device)
        try:
            with pruned(model, cell, subject.open().modules) as pruning:
                result = smaller_after_out_of_memory(
                    lambda size: evaluate(model, processor, questions, batch_size=size), default_batch_size(model)
                )
        except InputError as error:
            return {"refused": str(error)}
        write_outcomes(result.outcomes, place / OUTCOMES_FILE)
        return {**result.record(), "kept": pruning.kept_shares()}

    done = do_step(store, identity, ask)
    advance(STAGE, len(questions))
    return done


@task(name="sweep-rows", **OVER_NETWORK)
def rows_of(
    subject: Subject,
    cells: Sequence[PruningSettings],
    found: Sequence[Mapping[str, StepResult]],
    plain: Mapping[str, StepResult],
    workspace: str,
) -> list[Figures]:
    """Return the rows of `as_table`: one per cell and benchmark, and one per cell for all benchmarks together.

    `plain` are the evaluations of the same model without pruning, by benchmark.
    """
    store = open_workspace(workspace)
    before = {name: outcomes_of(done, store) for name, done in plain.items()}
    rows = []
    for cell, by_benchmark in zip(cells, found, strict=True):
        known = {
            "model": subject.label,
            "checkpoint": subject.sha256,
            **cell.model_dump(mode="json", include={"place", "score", "layer", "share"}),
        }
        refused = next((done.record.figures["refused"] for done in by_benchmark.values() if _refused(done)), None)
        after = {name: outcomes_of(done, store) for name, done in by_benchmark.items() if not _refused(done)}
        for name, done in by_benchmark.items():
            kept = {f"kept_{kind}": share for kind, share in done.record.figures.get("kept", {}).items()}
            figures = _figures(before[name], after[name]) if name in after else {"refused": refused}
            rows.append({**known, "task": name, **kept, **figures})
        if len(by_benchmark) > 1:
            whole = {"refused": refused} if refused else _figures(_together(before), _together(after))
            rows.append({**known, "task": ALL, **whole})
    return rows


def _refused(done: StepResult) -> bool:
    return "refused" in done.record.figures


def _together(outcomes: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Return the questions of all benchmarks, with the benchmark's name before their ids and images."""
    named = [
        each.assign(**{column: f"{name}/" + each[column] for column in ("question_id", "image_id")})
        for name, each in outcomes.items()
    ]
    return pd.concat(named, ignore_index=True)


def _figures(before: pd.DataFrame, after: pd.DataFrame) -> Figures:
    low, high = bootstrap_interval(after["score"], after["image_id"])
    lost: Loss = loss_between(before, after)
    renamed = {"loss": lost.loss, "loss_low": lost.low, "loss_high": lost.high, "p_value": lost.p_value, "n": lost.n}
    return {"accuracy": accuracy(after["score"]), "low": low, "high": high, **renamed}


def kept_on_average(found: Mapping[str, StepResult]) -> float | None:
    """Return the share of image tokens that a cell kept over all its benchmarks; None if it was refused."""
    if any(_refused(done) for done in found.values()):
        return None
    figures = [done.record.figures for done in found.values()]
    return sum(each["n"] * each["kept"]["image"] for each in figures) / sum(each["n"] for each in figures)


@task(name="adaptive-row", **OVER_NETWORK)
def adaptive_row(
    subject: Subject,
    cell: PruningSettings,
    plain: Mapping[str, StepResult],
    adaptive: Mapping[str, StepResult],
    fixed: Mapping[str, StepResult],
    workspace: str,
) -> Figures:
    """Return the losses of keeping a mass of attention and of a fixed share of as many tokens, and their difference.

    A positive ``gain`` says how much accuracy the adaptive choice saves; percentage points with 95 % intervals.
    """
    row = {"model": subject.label, "score": cell.score, "layer": cell.layer, "mass": cell.mass}
    row["kept_image"] = kept_on_average(adaptive)
    for name, before, after in (("adaptive", plain, adaptive), ("fixed", plain, fixed), ("gain", adaptive, fixed)):
        loss = loss_of(before, after, workspace)
        row |= {name: loss.loss, f"{name}_low": loss.low, f"{name}_high": loss.high} if loss else {}
    return row | {"n": sum(done.record.figures["n"] for done in plain.values())}


# Of every sweep; some have ``adaptive.csv``, and all have tables under names of their own.
NAMES = ("sweep.csv", "baselines.json", "losses.svg", "accuracy.svg")


def files_of_sweep(
    rows: Sequence[Figures], adaptive: Sequence[Figures], baselines: Mapping[str, Mapping[str, float]]
) -> dict[str, str]:
    """Return the text of a sweep's files by name: all rows, the paper's tables, heat maps, accuracy over shares.

    `baselines` are accuracies without pruning, in percent by model and benchmark; `adaptive` are of `adaptive_row`.
    """
    table = as_table(rows)
    texts = {
        "sweep.csv": table.to_csv(index=False, float_format="%.6g"),
        "baselines.json": json.dumps(baselines, indent=1, ensure_ascii=False) + "\n",
        "losses.svg": svg(loss_maps(table)),
        "accuracy.svg": svg(accuracy_by_share(table, baselines)),
    }
    if adaptive:
        texts["adaptive.csv"] = pd.DataFrame(list(adaptive)).to_csv(index=False, float_format="%.6g")
    keys = ["model", "task", "place", "score"]
    for values, _ in table.groupby(keys, sort=False):
        name = "-".join(slug(str(value)) for value in values)
        texts[f"tables/{name}.csv"] = grid(table, *values).to_csv(float_format="%.2f")
    return texts


def loss_of(plain: Mapping[str, StepResult], found: Mapping[str, StepResult], workspace: str) -> Loss | None:
    """Return what a cell loses over all its benchmarks together; None if it was refused."""
    if any(_refused(done) for done in found.values()):
        return None
    store = open_workspace(workspace)
    before, after = ({name: outcomes_of(done, store) for name, done in each.items()} for each in (plain, found))
    return loss_between(_together(before), _together(after))
