"""Eight compressions at once, on as many machines, into one registry and one workspace; and what they tell of secrets.

Each has a cache of its own, as a machine has, so that they share the servers and nothing else. Two pairs ask for the
same thing.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import yaml
from mlflow import MlflowClient

from bivlm.reports.lineage import find_workspace, read_lineage, verify
from infra.settings import SECRETS
from infra.surroundings import postgres_program
from tests.flows.running import Running, command_lines
from tests.integration.platform_processes import client_environment, secrets_of

pytestmark = pytest.mark.integration
GROUPS = (1, 2, 3, 4, 5, 6, 1, 2)  # of the adaptor; the last two as the first two
WORKSPACE = "s3://bivlm/together"
HUB_TOKEN = "hf_CanaryOfTheHubThatNobodyMayPrint"
ABOUT_THE_RUN = {"compression_report.json", "lineage.json", "report.html"}


@dataclass
class Together:
    """What eight compressions have left: exit codes, outputs, what they printed, and what `ps` showed meanwhile."""

    codes: list[int]
    outputs: list[Path]
    logs: list[str]
    command_lines: set[str]
    home: Path
    recipes: list[Path]
    model: str
    seconds: float


def arguments_of(model: str, recipe: Path, output: Path, workspace: str) -> list[str]:
    options = {"model": model, "recipe": str(recipe), "output": str(output), "workspace": workspace}
    return ["compress", *(text for name, value in options.items() for text in (f"--{name}", value))]


@pytest.fixture(scope="module")
def eight(stack, request_of, tmp_path_factory) -> Together:
    home = tmp_path_factory.mktemp("eight")
    runs, outputs, recipes, seen = [], [], [], set()
    asked = {}
    for number, groups in enumerate(GROUPS):
        asked = request_of(f"together-{groups}")
        recipe = asked["recipe"]
        recipe["components"]["adaptor"]["groups"] = groups
        machine = home / f"machine-{number}"
        machine.mkdir()
        (machine / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        environment = client_environment(
            stack, machine, HF_TOKEN=HUB_TOKEN, PREFECT_LOGGING_LEVEL="DEBUG", MLFLOW_LOGGING_LEVEL="DEBUG"
        )
        arguments = arguments_of(asked["model"], machine / "recipe.yaml", machine / "packed", WORKSPACE)
        runs.append(Running.command(arguments, machine / "log", **environment))
        outputs.append(machine / "packed")
        recipes.append(machine / "recipe.yaml")
        # Held until all are ready, so that they are really at once.
        runs[-1].process.send_signal(psutil.signal.SIGSTOP)
    began = time.monotonic()
    for run in runs:
        run.process.send_signal(psutil.signal.SIGCONT)
    while any(run.process.poll() is None for run in runs):
        seen |= command_lines()
        assert time.monotonic() - began < 1200
        time.sleep(0.5)
    codes = [run.end() for run in runs]
    logs = [run.printed + run.errors() for run in runs]
    return Together(codes, outputs, logs, seen, home, recipes, asked["model"], time.monotonic() - began)


def weights(output: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in output.iterdir()
        if path.name not in ABOUT_THE_RUN
    }


@pytest.fixture
def as_client(stack, eight, monkeypatch) -> MlflowClient:
    """This process as somebody who uses the servers."""
    for name, value in client_environment(stack, eight.home / "client").items():
        monkeypatch.setenv(name, value)
    return MlflowClient(stack.environment["MLFLOW_TRACKING_URI"])


def test_all_eight_end_well_and_are_what_they_would_be_alone(eight, as_client, stack, show):
    assert eight.codes == [0] * len(GROUPS), "\n".join(
        log[-2000:] for log, code in zip(eight.logs, eight.codes, strict=True) if code
    )
    show(f"eight at once: {eight.seconds:.0f} s")
    for output, groups in zip(eight.outputs, GROUPS, strict=True):  # those that asked for the same have the same
        assert weights(output) == weights(eight.outputs[GROUPS.index(groups)])
    for output in eight.outputs:
        found = verify(read_lineage(output), output, find_workspace(WORKSPACE))
        assert {finding.state for finding in found} == {"holds"}, found
    alone = eight.home / "alone"
    for number in (0, len(set(GROUPS)) - 1):
        arguments = arguments_of(eight.model, eight.recipes[number], alone / str(number), str(alone / "work"))
        run = Running.command(
            [*arguments, "--no-evaluate"],
            eight.home / "alone.log",
            MLFLOW_TRACKING_URI="sqlite:///" + str(alone / "mlflow.db"),
        )
        assert run.end() == 0, run.errors()
        assert weights(alone / str(number)) == weights(eight.outputs[number])


def test_the_registry_has_one_version_of_each_and_nothing_is_lost_or_there_twice(eight, as_client, api):
    names = [f"llava-together-{groups}" for groups in set(GROUPS)]
    for name in names:
        (version,) = as_client.search_model_versions(f"name = '{name}'")
        assert int(version.version) == 1
        assert as_client.get_model_version_by_alias(name, "candidate").version == version.version
    experiment = as_client.get_experiment_by_name("bivlm").experiment_id
    runs = [
        run
        for run in as_client.search_runs([experiment], "tags.`bivlm.role` = 'compression'")
        if run.data.tags["bivlm.recipe"].startswith("together-")
    ]
    assert {run.info.status for run in runs} == {"FINISHED"}
    parents = {run.data.tags["bivlm.recipe"]: run for run in runs}
    assert len(runs) == len(parents) == len(set(GROUPS))
    for output, groups in zip(eight.outputs, GROUPS, strict=True):
        run = parents[f"together-{groups}"]
        bits = json.loads((output / "compression_report.json").read_text())["bits"]
        assert run.data.metrics["bits/linears/stored"] == bits["linears"]["stored"]
        assert {"kl", "bits/model/stored", "seconds", "peak_memory_bytes"} <= run.data.metrics.keys()
        children = as_client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{run.info.run_id}'")
        assert Counter(child.data.tags["bivlm.role"] for child in children) == {"full precision": 1, "packed": 1}
        assert {child.info.status for child in children} == {"FINISHED"}
        assert all("accuracy" in child.data.metrics for child in children)
    assert len({frozenset(run.data.metrics) for run in parents.values()}) == 1
    ((rows,),) = api.rows("mlflow", "select count(*) from model_versions where name like 'llava-together-%'")
    assert rows == len(set(GROUPS))


def test_every_object_in_s3_is_what_its_name_says(eight, stack):
    stored = [path for path in (stack.folder / "s3" / "bivlm" / "together" / "objects").rglob("*") if path.is_file()]
    assert len(stored) > 100
    assert all(hashlib.sha256(path.read_bytes()).hexdigest() == path.name for path in stored)


def test_housekeeping_keeps_what_all_of_them_need(eight, as_client, api):
    done = api.bivlm("gc", "--workspace", WORKSPACE, "--keep-days", "0", "--wait", "0", "--json")
    said = json.loads(done.stdout)
    kept = [version for version in said["versions"] if version["name"].startswith("llava-together-")]
    assert len(kept) == len(set(GROUPS)) and {version["reason"] for version in kept} == {"candidate"}
    assert said["runs_in_progress"] == 0
    for output in eight.outputs:
        found = verify(read_lineage(output), output, find_workspace(WORKSPACE))
        assert {finding.state for finding in found} == {"holds"}


def test_no_secret_is_printed_shown_by_ps_stored_or_tracked(eight, stack):
    """Of every server and of the hub, in what was printed at the loudest, on disks, in S3 and in both databases."""
    values = {*secrets_of(stack), HUB_TOKEN}
    used = {**stack.environment, **stack.admin_environment}
    passwords = {value.rpartition(":")[2] for name, value in used.items() if "PASSWORD" in name or "AUTH" in name}
    assert passwords <= values and len(values) == len(SECRETS) + 1 and all(len(value) >= 12 for value in values)
    for value in values:
        hidden = value.encode()
        assert not any(value in line for line in eight.command_lines)
        assert not any(value in log for log in eight.logs)
        folders = [eight.home, stack.folder / "s3", stack.folder / "logs"]
        files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
        assert len(files) > 200
        assert [path for path in files if hidden in path.read_bytes()] == []
        for database in ("mlflow", "prefect"):
            assert hidden not in dump(stack, database)


def dump(stack, database: str) -> bytes:
    """Every row of a database as text."""
    environment = os.environ | stack.admin_environment
    command = [postgres_program("pg_dump"), "--data-only", "--inserts", database]
    done = subprocess.run(command, env=environment, capture_output=True, check=True)
    assert len(done.stdout) > 10_000
    return done.stdout


def test_a_wrong_password_is_refused_and_not_repeated(eight, stack):
    """Bad credentials of each server end the run with a message that names the server, and holds no secret."""
    wrong = "Wr0ngCanaryPassword"
    cases = {
        "AWS_SECRET_ACCESS_KEY": "bucket 'bivlm' cannot be opened",
        "MLFLOW_TRACKING_PASSWORD": "401",
        "PREFECT_API_AUTH_STRING": "401",
    }
    for variable, said in cases.items():
        value = f"bivlm:{wrong}" if variable == "PREFECT_API_AUTH_STRING" else wrong
        environment = client_environment(stack, eight.home / "wrong", **{variable: value})
        arguments = arguments_of(eight.model, eight.recipes[0], eight.home / "wrong" / "packed", WORKSPACE)
        done = subprocess.run(
            [sys.executable, "-m", "flows.cli", *arguments],
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode in (1, 2), done.stderr
        assert said in done.stderr, (variable, done.stderr[-1500:])
        assert wrong not in done.stdout + done.stderr
