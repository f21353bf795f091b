"""Housekeeping: remove from the workspace what no registered version needs and nobody used for a while."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Annotated, Any

from prefect import flow
from prefect.artifacts import create_markdown_artifact
from pydantic import Field

from bivlm.workspace.locks import one_machine_at_a_time
from bivlm.workspace.steps import Workspace
from bivlm.workspace.stores.location import default_workspace
from tasks import garbage


@flow(name="housekeeping", persist_result=False)
def gc_flow(
    workspace: str | None = None,
    keep_days: Annotated[float, Field(ge=0)] = 30.0,
    keep_versions: Annotated[int, Field(ge=0)] = 3,
    dry_run: bool = False,
    wait_seconds: Annotated[float, Field(ge=0)] = 60.0,
    although_empty: bool = False,
) -> dict[str, Any]:
    """Remove the steps and objects of `workspace` that no version needs and nobody used for `keep_days`.

    A version needs what its lineage records name. What may go is marked; after `wait_seconds` MLflow is asked and the
    workspace looked at again, and only what may still go is removed. Returns what was held, kept and removed, ready for
    JSON. Raises `InputError`, and removes nothing, if it is not certain what is needed: see
    `tasks.garbage.versions_to_keep`.

    Args:
        workspace: a folder or s3://bucket/prefix; without it that of the worker.
        keep_days: keep what was used since; the last two hours stay in any case.
        keep_versions: keep what the latest so many versions of each model need, beside those with an alias and former
            champions.
        dry_run: show what would go, and remove nothing.
        wait_seconds: before the second look.
        although_empty: continue if MLflow has no version that bivlm registered.
    """
    store = Workspace.open(workspace or default_workspace())
    # One would take back the other's note of an object, and remove the record of a step that was just done again.
    with one_machine_at_a_time(store, "gc"):
        kept = garbage.versions_to_keep(store.url, keep_versions, although_empty)
        found = garbage.look(store.url, kept.needed, keep_days)
        held, marked = found.inventory, found.marked
        said: dict[str, Any] = {
            "workspace": store.url,
            "dry_run": dry_run,
            "keep_days": keep_days,
            "versions": [asdict(version) for version in kept.versions],
            "runs_in_progress": len(held.began),
            "stages": found.by_stage(),
            "held": {
                "steps": len(held.steps),
                "objects": len(held.objects),
                "nbytes": held.nbytes({*held.steps, *held.objects}),
            },
            "marked": {
                "steps": len(marked & held.steps.keys()),
                "objects": len(marked & held.objects),
                "leftovers": len(marked & held.leftovers),
                "nbytes": held.nbytes(marked),
            },
            "removed": None,
        }
        if not dry_run:
            time.sleep(wait_seconds)
            again = garbage.versions_to_keep(store.url, keep_versions, although_empty)
            said["removed"] = asdict(garbage.collect(store.url, found, kept.needed | again.needed, keep_days))
    create_markdown_artifact(in_words(said), key="housekeeping", description=f"What stays and goes of {store.url}")
    return said


def in_words(said: dict[str, Any]) -> str:
    """Return the result of `gc_flow` as Markdown."""
    marked, removed = said["marked"], said["removed"]
    lines = [f"Workspace {said['workspace']}", "", "| stage | steps | not needed |", "|---|---:|---:|"]
    lines += [f"| {stage} | {each['steps']} | {each['going']} |" for stage, each in said["stages"].items()]
    lines += ["", f"{len(said['versions'])} registered versions keep what they are made of:", ""]
    lines += [f"- {each['name']}/{each['version']} ({each['reason']})" for each in said["versions"]]
    lines += ["", f"{said['runs_in_progress']} runs in progress keep what they use.", ""]
    lines.append(
        f"Not needed, and not used for {said['keep_days']:g} days: {_counted(marked)} of {_counted(said['held'])}."
    )
    if removed is None:
        lines.append("Nothing was removed: a dry run.")
    else:
        again = f"; {removed['put_back']} steps were found again meanwhile and stay" if removed["put_back"] else ""
        lines.append(f"Removed: {_counted(removed)}{again}.")
    return "\n".join(lines) + "\n"


def _counted(some: dict[str, Any]) -> str:
    return f"{some['steps']:,} steps, {some['objects']:,} objects, {some['nbytes'] / 1e6:,.1f} MB"
