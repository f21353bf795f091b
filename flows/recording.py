"""What a compression leaves when it is done: files beside the checkpoint, and everything in MLflow."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tasks import checkpoint, tracking
from tasks.lineage import write_lineage
from tasks.report import in_a_sentence, layers_for_figures, points_for_figures, with_at_chance, write_page
from tasks.steps import Done

if TYPE_CHECKING:
    from flows.compress import Request
    from flows.layers import PackedLayers
    from flows.results import Results


def record(
    request: Request,
    tracked: tracking.Tracking,
    done: PackedLayers,
    samples: Done,
    packed: checkpoint.PackedCheckpoint,
    report: dict[str, Any],
    results: Results | None,
    measured: dict[str, Done],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Write the lineage record and the page beside the checkpoint, and everything into MLflow.

    Returns the report, which then says where full precision is at chance, and what names everything in MLflow.
    The files come first: MLflow's copy of the checkpoint holds them.
    """
    base, recipe, workspace = request.base, request.recipe, request.store.url
    place = {"uri": tracking.public_uri(tracked.uri), "experiment": tracked.experiment_id, "run": tracked.run_id}
    evaluations = results.by_name() if results else {}
    lineage = write_lineage(
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
        report = with_at_chance(report, results.at_chance(), packed.folder)
    others = tracking.other_points(tracked, base.sha256, results.packed, samples) if results else []
    drawn = layers_for_figures(report, done.layers, measured)
    points = points_for_figures(base, recipe, report, figures, others)
    chance = {name: level for name, level in (results.chance if results else {}).items() if level is not None}
    write_page(packed.folder, report, figures, drawn, points, chance)

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
