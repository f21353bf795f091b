"""`bivlm trigger`: start a deployment through Prefect's API and follow it to its end, as from CI."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

from flows.cli.commands import DONE, FAILED, NOT_PASSED

DEPLOYMENT = "on-base-model/on-request"


def add(commands: Any) -> list[argparse.ArgumentParser]:
    """Add the parsers to the `commands` of another, and return them."""
    trigger = commands.add_parser("trigger", help="start a compression on a worker through Prefect's API, as from CI")
    option = trigger.add_argument
    option("--model", metavar="M", help="owner/name, a folder of the worker's, or s3://bucket/prefix")
    option("--revision", metavar="R", help="branch, tag or commit on the hub (default: its main branch)")
    option("--recipe", metavar="R", help="name of a recipe that the worker has (default: the deployment's)")
    option("--questions", type=int, metavar="N", help="only the first N of every benchmark")
    option("--no-evaluate", action="store_true", help="leave accuracy and divergence out")
    which = f"which one is started (default: {DEPLOYMENT})"
    option("--deployment", default=DEPLOYMENT, metavar="FLOW/NAME", help=which)
    option("--set", action="append", default=[], metavar="KEY=JSON", help="any other parameter of the deployment's")
    option("--once", action="store_true", help="the same request again finds the run that was started")
    option("--wait", action="store_true", help="follow the run to its end; its end is the exit code")
    option("--timeout", type=float, metavar="MINUTES", help="give up waiting after this; the run goes on")
    trigger.set_defaults(run=_trigger)
    return [trigger]


def _trigger(options: argparse.Namespace) -> int:
    from flows.cli.follow import follow, start
    from tasks.runtime.states import GATE_STATE

    parameters = {
        "model": options.model,
        "revision": options.revision or None,  # CI passes inputs that were left empty
        "recipe": options.recipe or None,
        "questions": options.questions,
        "evaluate": False if options.no_evaluate else None,
        "trigger": _who_asks(),
        **dict(map(_parameter, options.set)),
    }
    run, page = start(options.deployment, parameters, once=options.once)
    print(f"Prefect: {page}", flush=True)
    if not options.wait:
        return DONE
    timeout = None if options.timeout is None else options.timeout * 60
    try:
        ended = follow(run.id, lambda line: print(line, file=sys.stderr, flush=True), timeout_seconds=timeout)
    except TimeoutError as error:
        print(f"bivlm trigger: {error}", file=sys.stderr)
        return FAILED
    for each in ended.pages:
        print(f"MLflow: {each}")
    state = ended.state
    print(f"{state.name}: {state.message}" if state.message else state.name)
    if state.is_completed():
        return DONE
    return NOT_PASSED if state.name == GATE_STATE else FAILED


def _who_asks() -> str:
    """Return who asks, for the lineage record: the workflow's run on GitHub, else a user at a terminal."""
    from flows.origin import BY_HAND

    repository, run = os.environ.get("GITHUB_REPOSITORY"), os.environ.get("GITHUB_RUN_ID")
    on_github = os.environ.get("GITHUB_ACTIONS") == "true" and repository and run
    return f"ci {repository} run {run}" if on_github else BY_HAND


def _parameter(text: str) -> tuple[str, Any]:
    from bivlm.errors import InputError
    from bivlm.untrusted import parse_json

    key, separator, value = text.partition("=")
    try:
        if key and separator:
            return key, parse_json(value, key)
    except InputError:
        pass
    raise InputError(f"--set {text!r}: expected KEY=JSON, as questions=100 or output='\"/data/out\"'")
