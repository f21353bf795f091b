"""What a compression leaves when it is done: files beside the checkpoint, and everything in MLflow."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from bivlm.checkpoint.outputs import PAGE, SWEEP, is_of_sweep
from bivlm.checkpoint.reading import LINEAGE, REPORT
from bivlm.reports.table_folders import write_tables
from tasks import checkpoint, pruning, tracking
from tasks.lineage import make_lineage
from tasks.report import (
    in_a_sentence,
    layers_for_figures,
    page_text,
    points_for_figures,
    report_text,
    with_at_chance,
    write_records,
)
from tasks.runtime.steps import StepResult

if TYPE_CHECKING:
    from flows.layers import PackedLayers
    from flows.pruning import SweepResult
    from flows.request import Request
    from flows.results import Results


def record(
    request: Request,
    tracked: tracking.Tracking,
    done: PackedLayers,
    samples: StepResult,
    packed: checkpoint.PackedCheckpoint,
    report: dict[str, Any],
    results: Results | None,
    measured: dict[str, StepResult],
    swept: SweepResult | None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Write the records, the page and the sweep's files beside the checkpoint, and everything into MLflow.

    Returns the report, which then says where full precision is at chance, and what names everything in MLflow.
    The checkpoint may be an earlier output: its files are written one after the other, when all of them are known.
    They come before MLflow, whose copy of the checkpoint holds them.
    """
    base, recipe, workspace = request.base, request.recipe, request.store.url
    place = {"uri": tracking.public_uri(tracked.uri), "experiment": tracked.experiment_id, "run": tracked.run_id}
    evaluations = results.by_name() if results else {}
    lineage = make_lineage(
        base,
        recipe,
        done.layers,
        done.shards,
        request.tables,
        done.tables,
        samples,
        done.between,
        packed,
        evaluations,
        place,
        tracked.trigger,
        workspace,
    )
    figures = results.figures() if results else None
    if results is not None:
        report = with_at_chance(report, results.at_chance())
    others = tracking.other_points(tracked, base.sha256, results.packed, samples) if results else []
    drawn = layers_for_figures(report, done.layers, measured)
    points = points_for_figures(base, recipe, report, figures, others)
    chance = {name: level for name, level in (results.chance if results else {}).items() if level is not None}
    page = page_text(lineage, report, figures, drawn, points, chance)
    files = pruning.files_of_sweep(swept.rows, swept.adaptive, swept.baselines) if swept else {}
    records = {REPORT: report_text(report), LINEAGE: lineage.model_dump_json(indent=1) + "\n", PAGE: page}
    write_records(packed.folder, records)
    if swept is not None:
        texts = {f"{SWEEP}/{name}": text for name, text in files.items()}
        write_tables(Path(packed.folder), texts, is_of_sweep)
        tracking.log_sweep(swept.rows, str(Path(packed.folder) / SWEEP), list(files), workspace, tracked)

    model_id = tracking.log_model(tracked, base, recipe, packed.folder, packed.sha256)
    # In the order in which MLflow's page shows the metrics: what it can do, then what it costs.
    if results is not None:
        compared = (results.full_precision, results.packed, results.divergence, samples)
        tracking.log_comparison(tracked, *compared, model_id, results.at_chance())
    tracking.log_compression(tracked, report, packed.sha256, samples, model_id)
    base_id = tracking.log_base_model(tracked, base)
    if results is not None:
        for done in results.full_precision.values():
            tracking.log_evaluation(tracked, "full precision", base.sha256, done, base_id, workspace)
        for done in results.packed.values():
            tracking.log_evaluation(tracked, "packed", packed.sha256, done, model_id, workspace)
    description = tracking.note(base, recipe, tracked.trigger, in_a_sentence(report, figures))
    measured_on = results.measured_on if results else None
    tracking.log_documents(tracked, packed.folder, description, drawn, points, chance, measured_on)
    asked = tracking.questions_asked(recipe, results is not None, request.questions)
    facts = tracking.facts_of(tracked, lineage, samples, report, base_id)
    name, version = tracking.register(
        tracked, base, recipe, model_id, facts, tracking.scores_of(lineage, figures, asked)
    )
    return report, {"model_id": model_id, "registered_model": name, "version": version}
