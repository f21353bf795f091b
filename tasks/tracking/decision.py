"""A gate's decision in MLflow: on the run and the version, and the champion moved if it passed."""

from __future__ import annotations

from typing import Any

from prefect import task

from bivlm.evaluation.gate import Decision
from bivlm.evaluation.paired import LargestLoss
from tasks.runtime.naming import slug
from tasks.runtime.policy import OVER_NETWORK
from tasks.tracking.facts import GATE_TAG, PASSED, QUESTIONS_TAG, of_decision
from tasks.tracking.pages import write_pages
from tasks.tracking.promotion import promote_by_gate
from tasks.tracking.record import log_new_metrics
from tasks.tracking.registry import CHAMPION, tag_version, version_at
from tasks.tracking.run import Tracking


@task(name="gate", **OVER_NETWORK)
def apply_decision(
    tracking: Tracking, name: str, version: int, decision: Decision, losses: dict[str, LargestLoss], model_id: str
) -> dict[str, Any]:
    """Write `decision` down and, if it was passed, make the version champion, forwards only.

    Returns ``{"passed", "reasons", "champion", "previous", "said"}``: the versions that are champion now and were
    before, None for none, and what happened in a sentence. A decision after fewer questions than the one that is
    written down does not take its place, and moves no champion that one would not have moved.
    """
    client = tracking.client
    questions = sum(found.n for found in losses.values())
    registered = client.get_model_version(name, str(version))
    asked_before = int(registered.tags.get(QUESTIONS_TAG, 0))
    stands = questions >= asked_before
    if stands:
        metrics = {f"gate/{slug(benchmark)}/lost": found.loss for benchmark, found in losses.items()}
        metrics |= {f"gate/{slug(benchmark)}/lost_at_most": found.largest for benchmark, found in losses.items()}
        log_new_metrics(client, tracking.run_id, metrics, model_id)
        tags = of_decision(decision, questions)
        for key, value in tags.items():
            client.set_tag(tracking.run_id, key, value)
    if decision.passed and (stands or registered.tags.get(GATE_TAG) == PASSED):
        outcome = promote_by_gate(client, name, version, "; ".join(decision.reasons))
        champion, previous, said = outcome.champion, outcome.previous, outcome.said
    else:
        champion = previous = version_at(client.get_registered_model(name), CHAMPION)
        said = "no version is champion" if champion is None else f"version {champion} stays champion"
        if decision.passed:
            said += f": it was refused after {asked_before} questions, and these are {questions}"
    if stands:  # last: until then the version is not decided about, and the same request decides again
        tag_version(client, registered, tags)
    return {
        "passed": decision.passed,
        "reasons": list(decision.reasons),
        "champion": champion,
        "previous": previous,
        "said": said,
    }


@task(name="write-pages", **OVER_NETWORK)
def refresh_pages(tracking: Tracking, name: str) -> None:
    """Let the pages of a registered model, its versions and its base model say what is so now."""
    write_pages(tracking.client, name)
