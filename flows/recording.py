"""Record a finished compression: files beside the checkpoint, and everything in MLflow."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bivlm.checkpoint.outputs import PAGE, SWEEP, is_of_sweep
from bivlm.checkpoint.reading import LINEAGE, REPORT
from bivlm.reports.lineage import Lineage
from bivlm.reports.report_page import SAMPLES, Drawn, draw_figures
from bivlm.reports.table_folders import write_tables
from flows.request import Request
from flows.results import Measurements
from tasks import pruning, tracking
from tasks.compressed import CompressedModel
from tasks.lineage import make_lineage
from tasks.report import (
    Report,
    layers_for_figures,
    page_text,
    points_for_figures,
    report_text,
    summarize,
    with_at_chance,
    write_records,
)
from tasks.runtime.steps import Figures


@dataclass(frozen=True)
class Recorded:
    """The report, which says where full precision is at chance, and what names the model in MLflow."""

    report: Report
    registered: dict[str, str]


@dataclass(frozen=True)
class _Page:
    """The content of the page and of MLflow: the lineage record, the results, and the figures."""

    lineage: Lineage
    report: Report
    evaluation: Figures | None
    layers: list[Figures]
    drawn: list[Drawn]
    chance: dict[str, float]


def record(
    request: Request, tracked: tracking.Tracking, model: CompressedModel, report: Report, measured: Measurements
) -> Recorded:
    """Write the records, the page and the sweep's files beside the checkpoint, and everything into MLflow.

    The checkpoint may be an earlier output: its files are written one after the other, when all of them are known.
    They come before MLflow, whose copy of the checkpoint holds them.
    """
    page = _make_page(request, tracked, model, report, measured)
    _write(model, page, measured, tracked, request.store.url)
    return Recorded(page.report, _log(request, tracked, model, page, measured))


def _make_page(
    request: Request, tracked: tracking.Tracking, model: CompressedModel, report: Report, measured: Measurements
) -> _Page:
    base, results = request.base, measured.results
    place = {"uri": tracking.public_uri(tracked.uri), "experiment": tracked.experiment_id, "run": tracked.run_id}
    evaluations = results.by_name() if results else {}
    lineage = make_lineage(model, evaluations, place, tracked.trigger, request.store.url)
    evaluation, others = None, []
    if results is not None:
        evaluation = results.figures()
        report = with_at_chance(report, results.at_chance())
        others = tracking.other_points(tracked, base.sha256, results.packed, model.samples)
    layers = layers_for_figures(report, model.layers, measured.curves)
    points = points_for_figures(base, request.recipe, report, evaluation, others)
    chance = results.known_chance() if results else {}
    drawn = draw_figures(layers, points, chance, results.measured_on if results else SAMPLES)
    return _Page(lineage, report, evaluation, layers, drawn, chance)


def _write(
    model: CompressedModel, page: _Page, measured: Measurements, tracked: tracking.Tracking, workspace: str
) -> None:
    """Write the records and the sweep's files beside the checkpoint, once the text of all of them is known."""
    folder, swept = model.checkpoint.folder, measured.sweep
    html = page_text(page.lineage, page.report, page.evaluation, page.layers, page.drawn, page.chance)
    files = pruning.files_of_sweep(swept.rows, swept.adaptive, swept.baselines) if swept else {}
    lineage = page.lineage.model_dump_json(indent=1) + "\n"
    write_records(folder, {REPORT: report_text(page.report), LINEAGE: lineage, PAGE: html})
    if swept is not None:
        write_tables(Path(folder), {f"{SWEEP}/{name}": text for name, text in files.items()}, is_of_sweep)
        tracking.log_sweep(swept.rows, str(Path(folder) / SWEEP), list(files), workspace, tracked)


def _log(
    request: Request, tracked: tracking.Tracking, model: CompressedModel, page: _Page, measured: Measurements
) -> dict[str, str]:
    """Log the model, its metrics and documents, and register it; returns what names it in MLflow."""
    base, recipe, workspace = request.base, request.recipe, request.store.url
    packed, results, report = model.checkpoint, measured.results, page.report
    model_id = tracking.log_model(tracked, base, recipe, packed.folder, packed.sha256)
    # In the order in which MLflow's page shows the metrics: what it can do, then what it costs.
    if results is not None:
        compared = (results.full_precision, results.packed, results.divergence, model.samples)
        tracking.log_comparison(tracked, *compared, model_id, results.at_chance())
    tracking.log_compression(tracked, report, packed.sha256, model.samples, model_id)
    base_id = tracking.log_base_model(tracked, base)
    if results is not None:
        for done in results.full_precision.values():
            tracking.log_evaluation(tracked, "full precision", base.sha256, done, base_id, workspace)
        for done in results.packed.values():
            tracking.log_evaluation(tracked, "packed", packed.sha256, done, model_id, workspace)
    description = tracking.note(base, recipe, tracked.trigger, summarize(report, page.evaluation))
    svgs = {figure.name: figure.svg for figure in page.drawn}
    tracking.log_documents(tracked, packed.folder, description, svgs)
    asked = tracking.questions_asked(recipe, results is not None, request.questions)
    facts = tracking.facts_of(tracked, page.lineage, model.samples, report, base_id)
    scores = tracking.scores_of(page.lineage, page.evaluation, asked)
    name, version = tracking.register(tracked, base, recipe, model_id, facts, scores)
    return {"model_id": model_id, "registered_model": name, "version": version}
