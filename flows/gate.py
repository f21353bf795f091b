"""The end of a compression whose recipe has a gate: candidate becomes champion, or the run says why not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bivlm.errors import InputError
from bivlm.evaluation.gate import Figures, decide
from bivlm.recipe.loading import Recipe
from tasks import evaluation, tracking

if TYPE_CHECKING:
    from flows.results import Results


def refuse_what_cannot_be_decided(recipe: Recipe, evaluate: bool) -> None:
    """Raise `InputError` for a gate that looks at accuracies that are not going to be measured."""
    if recipe.gate is not None and recipe.gate.accuracy is not None and not evaluate:
        raise InputError(
            f"recipe {recipe.name}: its gate bounds the accuracy that may be lost, which takes an evaluation; "
            "evaluate, or take gate.accuracy out of the recipe"
        )


def decide_at_the_end(
    recipe: Recipe,
    tracked: tracking.Tracking,
    registered: dict[str, Any],
    report: dict[str, Any],
    results: Results | None,
    workspace: str,
) -> tuple[dict[str, Any] | None, str | None]:
    """(what came of the gate, the message if it was not passed); the first is None without a gate.

    When the version is registered and everything is recorded: passed, it becomes champion; not passed, the champion
    stays. Either way the decision with its figures is written on the run, the version and their pages.
    """
    decided, refused = None, None
    name = registered["registered_model"]
    if recipe.gate is not None:
        losses, at_chance = {}, []
        if recipe.gate.accuracy is not None and results is not None:
            confidence = recipe.gate.accuracy.confidence
            losses = evaluation.largest_losses(results.full_precision, results.packed, confidence, workspace)
            at_chance = results.at_chance()
        bits = report["bits"]
        decision = decide(recipe.gate, Figures(bits["linears"]["stored"], bits["model"]["stored"], losses, at_chance))
        decided = tracking.apply_decision(
            tracked, name, registered["version"], decision, losses, registered["model_id"]
        )
        if not decision.passed:
            refused = (
                f"gate not passed by {name} version {registered['version']}: {'; '.join(decision.refused_by)}; "
                f"{decided['said']}"
            )
    tracking.refresh_pages(tracked, name)
    return decided, refused
