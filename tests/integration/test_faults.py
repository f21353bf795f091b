"""Each part of the platform is killed in the middle of a run and brought back; docs/runbook.md says what happened.

Whatever is killed, the run ends: done, or failed with a reason, and then the same request goes on from there. After it
everything is as if nothing had happened: one version, every metric, the same bytes.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from bivlm.reports.lineage import find_workspace, read_lineage, verify
from infra.stack import Servers
from tests.integration.platform_processes import ENDED, Api, Worker, until

pytestmark = pytest.mark.integration
DEPLOYMENT = "compress/compress"
SECONDS_AWAY = 12
LONGER = 150  # than a run may be silent, see infra.automations
MEASURED_ANEW = {"seconds", "peak_memory_bytes"}


class Outcome:
    """What MLflow, PostgreSQL and the output folder hold of one request."""

    def __init__(self, api: Api, servers: Servers, request: dict[str, Any]) -> None:
        name = request["recipe"]["name"]
        of_recipe = f"SELECT run_uuid FROM tags WHERE key = 'bivlm.recipe' AND value = '{name}'"
        requests = f"SELECT value FROM tags WHERE key = 'bivlm.request' AND run_uuid IN ({of_recipe})"
        family = f"SELECT run_uuid FROM tags WHERE key = 'bivlm.request' AND value IN ({requests})"
        found = dict(api.rows("mlflow", f"SELECT run_uuid, status FROM runs WHERE run_uuid IN ({family})"))
        self.statuses = Counter(found.values())
        self.versions = api.rows(
            "mlflow", f"SELECT version, status FROM model_versions WHERE name = 'llava-{name}' ORDER BY version"
        )
        ids = ", ".join(f"'{run}'" for run in found) or "''"
        role = "SELECT value FROM tags WHERE key = 'bivlm.role' AND run_uuid = m.run_uuid"
        latest = api.rows("mlflow", f"SELECT ({role}), key, value FROM latest_metrics m WHERE run_uuid IN ({ids})")
        self.metrics = {(role, key): value for role, key, value in latest if key not in MEASURED_ANEW}
        output = Path(request["output"])
        self.weights = {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in output.glob("*.safetensors")
        }
        self.left_over = [path.name for path in output.parent.glob(f".*{output.name}*")] + [
            path.name for path in output.rglob(".partial*")
        ]
        self.output, self.workspace = output, request["workspace"]

    def assert_like(self, undisturbed: Outcome) -> None:
        assert [status for _, status in self.versions] == ["READY"], self.versions
        assert self.statuses == undisturbed.statuses == {"FINISHED": 3}
        assert self.metrics == undisturbed.metrics
        assert self.weights == undisturbed.weights
        assert self.left_over == []


@pytest.fixture(scope="module")
def worker(stack, api, home):
    worker = Worker(stack, "gpu", home / "worker").start()
    yield worker
    worker.kill()


@pytest.fixture(scope="module")
def undisturbed(stack, api, worker, request_of) -> Outcome:
    """A run that nothing happened to."""
    request = request_of("undisturbed")
    assert api.wait(api.run(DEPLOYMENT, request))["type"] == "COMPLETED"
    return Outcome(api, stack, request)


def at_layers(stack: Servers, name: str) -> bool:
    """Whether a good part of the layers is packed."""
    return len(list((stack.folder / "s3" / "bivlm" / name / "steps").glob("*.json"))) >= 30


def at_recording(stack: Servers, api: Api, name: str) -> bool:
    """Whether the checkpoint is on its way to the registry: MLflow has a logged model of it."""
    return bool(api.rows("mlflow", f"SELECT 1 FROM logged_models WHERE name = 'llava-{name}'"))


VICTIMS = ("worker", "mlflow", "s3", "postgres", "prefect")
CASES = [(victim, moment, SECONDS_AWAY) for victim in VICTIMS for moment in ("layers", "recording")]


@pytest.mark.parametrize(("victim", "moment", "away"), [*CASES, ("prefect", "layers", LONGER)])
def test_killed_in_the_middle_and_brought_back(
    stack, api, worker, undisturbed, request_of, monkeypatch, show, victim, moment, away
):
    name = f"{victim}-{moment}-{away}"
    request = request_of(name)
    run = api.run(DEPLOYMENT, request)
    reached = (lambda: at_layers(stack, name)) if moment == "layers" else (lambda: at_recording(stack, api, name))
    until(f"the moment of {name}", lambda: reached() or api.state(run)["type"] in ENDED)
    assert api.state(run)["type"] not in ENDED, api.state(run)
    server = worker if victim == "worker" else stack
    arguments = () if victim == "worker" else (victim,)
    server.kill(*arguments)
    killed = time.monotonic()
    time.sleep(away)
    server.start() if victim == "worker" else stack.start([victim])
    first = api.wait(run, 600)
    seconds = time.monotonic() - killed
    attempts = 1
    state = first
    while state["type"] != "COMPLETED" and attempts < 3:
        assert state["message"], state  # a reason
        state = api.wait(api.run(DEPLOYMENT, request), 600)
        attempts += 1
    came_to = f"{first['type']} {seconds:.0f} s after the kill: {first['message']}"
    show(f"{victim} | {moment} | away {away} s | {came_to} | attempts: {attempts}")
    outcome = Outcome(api, stack, request)
    assert state["type"] == "COMPLETED", state
    outcome.assert_like(undisturbed)
    for key, value in stack.environment.items():
        monkeypatch.setenv(key, value)
    found = verify(read_lineage(outcome.output), outcome.output, find_workspace(outcome.workspace))
    assert {finding.state for finding in found} == {"holds"}
