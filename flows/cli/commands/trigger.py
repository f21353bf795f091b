"""`bivlm trigger`: a deployment started through Prefect's API and followed to its end, as from CI."""

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
    trigger.add_argument("--model", metavar="M", help="owner/name, a folder of the worker's, or s3://bucket/prefix")
    trigger.add_argument("--revision", metavar="R", help="branch, tag or commit on the hub (default: its main branch)")
    trigger.add_argument(
        "--recipe", metavar="R", help="name of a recipe that the worker has (default: the deployment's)"
    )
    trigger.add_argument("--questions", type=int, metavar="N", help="only the first N of every benchmark")
    trigger.add_argument("--no-evaluate", action="store_true", help="leave accuracy and divergence out")
    trigger.add_argument(
        "--deployment", default=DEPLOYMENT, metavar="FLOW/NAME", help=f"which one is started (default: {DEPLOYMENT})"
    )
    trigger.add_argument(
        "--set", action="append", default=[], metavar="KEY=JSON", help="any other parameter of the deployment's"
    )
    trigger.add_argument("--once", action="store_true", help="the same request again finds the run that was started")
    trigger.add_argument("--wait", action="store_true", help="follow the run to its end; its end is the exit code")
    trigger.add_argument("--timeout", type=float, metavar="MINUTES", help="give up waiting after this; the run goes on")
    trigger.set_defaults(run=_trigger)
    return [trigger]


def _trigger(options: argparse.Namespace) -> int:
    from flows.cli.follow import follow, start

    parameters = {
        "model": options.model,
        "revision": options.revision or None,  # CI passes inputs that were left empty
        "recipe": options.recipe or None,
        "questions": options.questions,
        "evaluate": False if options.no_evaluate else None,
        "trigger": who_asks(),
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
    print(f"{ended.state}: {ended.message}" if ended.message else ended.state)
    if ended.completed:
        return DONE
    return NOT_PASSED if ended.refused else FAILED


def who_asks() -> str:
    """For the lineage record: the workflow's run on GitHub, else somebody at a terminal."""
    from flows.origin import BY_HAND

    repository, run = os.environ.get("GITHUB_REPOSITORY"), os.environ.get("GITHUB_RUN_ID")
    if os.environ.get("GITHUB_ACTIONS") == "true" and repository and run:
        return f"ci {repository} run {run}"
    return BY_HAND


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
