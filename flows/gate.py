"""The end of a compression whose recipe has a gate: the candidate becomes champion, or the run says why not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bivlm.errors import InputError
from bivlm.evaluation.gate import Figures, decide
from bivlm.recipe.loading import Recipe
from tasks import evaluation, tracking

if TYPE_CHECKING:
    from flows.results import Results


def refuse_what_cannot_be_decided(recipe: Recipe, evaluate: bool) -> None:
    """Raise `InputError` for a gate that bounds accuracies that are not going to be measured."""
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
    """Return (what came of the gate, the message if it did not pass); the first is None without a gate.

    Call it when everything is recorded. If the gate passes, the version becomes champion; if not, the champion is
    unchanged. The decision with its figures is written on the run, the version and their pages.
    """
    decided, refused = None, None
    name, version = registered["registered_model"], registered["version"]
    if recipe.gate is not None:
        losses, at_chance = {}, []
        if recipe.gate.accuracy is not None and results is not None:
            confidence = recipe.gate.accuracy.confidence
            losses = evaluation.largest_losses(results.full_precision, results.packed, confidence, workspace)
            at_chance = results.at_chance()
        bits = report["bits"]
        decision = decide(recipe.gate, Figures(bits["linears"]["stored"], bits["model"]["stored"], losses, at_chance))
        outcome = tracking.apply_decision(tracked, name, version, decision, losses, registered["model_id"])
        decided = {"passed": decision.passed, "reasons": list(decision.reasons)}
        decided |= {"champion": outcome.champion, "previous": outcome.previous, "said": outcome.said}
        if not decision.passed:
            refused = f"gate not passed by {name} version {version}: {'; '.join(decision.refused_by)}; {outcome.said}"
    tracking.refresh_pages(tracked, name)
    return decided, refused
