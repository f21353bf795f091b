"""A fresh Prefect server, workers in processes of their own, and everything that starts a compression on them."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zlib
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import yaml
from mlflow import MlflowClient
from tiny_llava import make_tiny_llava

from bivlm.checkpoint.reading import Checkpoint
from flows.cli.commands import NOT_PASSED
from flows.cli.main import BAD_INPUT, DONE, FAILED
from tasks.watching.watch_lists import Revision
from tests.servers import PATIENCE, Server, free_port

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
DEPLOYMENTS = {entry["name"]: entry for entry in yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]}

pytestmark = pytest.mark.slow


@dataclass
class Platform:
    """Server, workers and the folder with all that they use."""

    place: Path
    api: str
    environment: dict[str, str]

    def run(self, *command: str, **changes: str) -> subprocess.CompletedProcess:
        environment = {key: value for key, value in (self.environment | changes).items() if value}
        command = (str(BIN / command[0]), *command[1:])
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE)

    def bivlm(self, *arguments: str, **changes: str) -> subprocess.CompletedProcess:
        return self.run("python", "-m", "flows.cli", *arguments, **changes)

    def trigger(self, *arguments: str, ends: int = DONE, **changes: str) -> subprocess.CompletedProcess:
        """`bivlm trigger`, followed to the end of the run."""
        done = self.bivlm("trigger", *arguments, "--wait", **changes)
        assert done.returncode == ends, done.stdout + done.stderr
        return done

    def look(self, deployment: str) -> None:
        """Two runs of a deployment that looks at the list: in the first a folder may still be arriving."""
        for _ in range(2):
            self.trigger("--deployment", deployment, "--set", "settled_seconds=0")

    def post(self, path: str, **body: object) -> list[dict]:
        return httpx.post(f"{self.api}/{path}", json=body, timeout=30).raise_for_status().json()

    @property
    def registry(self) -> MlflowClient:
        return MlflowClient(f"sqlite:///{self.place / 'workspace' / 'mlflow.db'}")

    def versions(self, name: str) -> list:
        return self.registry.search_model_versions(f"name = '{name}'")

    def add_model(self, name: str) -> Revision:
        """Each is another one: the same bytes by the same recipe are made once, whatever their folder is called."""
        folder = make_tiny_llava(self.place / "models" / name, seed=zlib.crc32(name.encode()))
        return Revision(str(folder), Checkpoint.open(folder).digest(), "small")


@pytest.fixture(scope="module")
def platform(tmp_path_factory, small_recipe, mlflow_database):
    """Everything as docs/deployments.md says, with one process worker a pool."""
    place = tmp_path_factory.mktemp("platform")
    for name in ("models", "recipes", "workspace"):
        (place / name).mkdir()
    shutil.copyfile(mlflow_database, place / "workspace" / "mlflow.db")
    impossible = {**small_recipe, "name": "impossible", "gate": {"bits": {"linears": 0.001}}}
    for recipe in (small_recipe, impossible):
        (place / "recipes" / f"{recipe['name']}.yaml").write_text(yaml.safe_dump(recipe))
    listed = {"format": 1, "models": [{"model": f"{place}/models/*", "recipes": ["small"]}]}
    (place / "base-models.yaml").write_text(yaml.safe_dump(listed))
    port = free_port()
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PREFECT_", "MLFLOW_"))} | {
        "PREFECT_API_URL": f"http://127.0.0.1:{port}/api",
        "PREFECT_HOME": str(place / "prefect"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_WORKER_QUERY_SECONDS": "1",
        "PREFECT_RUNNER_HEARTBEAT_FREQUENCY": "30",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "BIVLM_WORKSPACE": str(place / "workspace"),
        "BIVLM_OUTPUTS": str(place / "outputs"),
        "BIVLM_RECIPES": str(place / "recipes"),
        "BIVLM_BASE_MODELS": str(place / "base-models.yaml"),
        "BIVLM_CACHE": str(place / "cache"),
    }
    # The server's own settings, or the sessions' test server would be asked by it.
    server = Server(
        [str(BIN / "prefect"), "server", "start", "--port", str(port)], port, place / "server.log", environment
    )
    platform, workers = Platform(place, environment["PREFECT_API_URL"], environment), []
    with pytest.MonkeyPatch.context() as patch:
        for key in [key for key in os.environ if key.startswith("PREFECT_")]:
            patch.delenv(key)
        server.start()
    try:
        _wait_until(lambda: httpx.get(f"{platform.api}/health").is_success)
        for pool in ("gpu", "cpu"):
            made = platform.run("prefect", "work-pool", "create", pool, "--type", "process")
            assert made.returncode == 0, made.stderr
        deployed = platform.run("prefect", "--no-prompt", "deploy", "--all")
        assert deployed.returncode == 0, deployed.stdout + deployed.stderr
        _stop_schedules(platform)
        for pool in ("gpu", "cpu"):
            with (place / f"{pool}.log").open("wb") as log:
                command = [str(BIN / "prefect"), "worker", "start", "--pool", pool, "--name", pool]
                workers.append(
                    subprocess.Popen(
                        command, env=environment, cwd=place, stdout=log, stderr=log, start_new_session=True
                    )
                )
        yield platform
    finally:
        for worker in workers:
            os.killpg(worker.pid, signal.SIGKILL)
            worker.wait()
        server.kill()


def _wait_until(happened):
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            if found := happened():
                return found
        except httpx.TransportError:
            pass
        assert time.monotonic() < deadline, "it does not happen"
        time.sleep(0.5)


def _stop_schedules(platform):
    """Tests say themselves when something runs."""
    for deployment in platform.post("deployments/filter"):
        for schedule in deployment["schedules"]:
            address = f"{platform.api}/deployments/{deployment['id']}/schedules/{schedule['id']}"
            # A server on SQLite that is busy scheduling says 503.
            _wait_until(lambda address=address: httpx.patch(address, json={"active": False}, timeout=60).is_success)


def test_all_deployments_are_there_with_their_pools_limits_and_schedules_and_no_path_of_this_machine(platform):
    found = {each["name"]: each for each in platform.post("deployments/filter")}
    assert found.keys() == DEPLOYMENTS.keys()
    for name, each in found.items():
        assert each["entrypoint"] == DEPLOYMENTS[name]["entrypoint"] and each["pull_steps"] == []
        assert each["work_pool_name"] in ("gpu", "cpu") and each["enforce_parameter_schema"]
        assert each["global_concurrency_limit"]["limit"] == 1
        assert len(each["schedules"]) == len(DEPLOYMENTS[name].get("schedules", []))
        assert str(ROOT) not in json.dumps(each) and str(Path.home()) not in json.dumps(each)


def test_deploying_again_doubles_nothing(platform):
    before = [len(platform.post(f"{kind}/filter")) for kind in ("deployments", "automations")]
    assert platform.run("prefect", "--no-prompt", "deploy", "--all").returncode == 0
    _stop_schedules(platform)
    assert [len(platform.post(f"{kind}/filter")) for kind in ("deployments", "automations")] == before
    assert before[1] == 1


def test_parameters_are_judged_by_the_server_from_the_flows_signature(platform):
    (found,) = [each for each in platform.post("deployments/filter") if each["name"] == "on-request"]
    schema = found["parameter_openapi_schema"]
    assert schema["required"] == ["model_id"]
    assert "owner/name on the hub" in schema["properties"]["model_id"]["description"]
    for wrong in ({"recipe": "../../etc/passwd"}, {"questions": 0}, {"evaluate": "perhaps"}):
        answer = httpx.post(
            f"{platform.api}/deployments/{found['id']}/create_flow_run",
            json={"parameters": {"model_id": "owner/name", **wrong}},
        )
        assert answer.status_code == 409, answer.text


def test_a_model_by_bivlm_trigger_is_followed_to_its_page_in_mlflow_and_made_once(platform):
    revision = platform.add_model("asked")
    github = {"GITHUB_ACTIONS": "true", "GITHUB_REPOSITORY": "owner/repo", "GITHUB_RUN_ID": "17"}
    asked = ("--model", revision.model, "--recipe", "small", "--once")
    done = platform.trigger(*asked, **github)
    (version,) = platform.versions("asked-small")
    assert f"/runs/{version.run_id}" in done.stdout and "Completed" in done.stdout
    assert version.tags["bivlm.trigger"] == "ci owner/repo run 17"
    assert "Running" in done.stderr and "event" in done.stderr  # states, and lines of the log
    (output,) = (platform.place / "outputs").glob(f"*/small/{revision.revision[:16]}")
    assert Checkpoint.open(output).packed

    # The same run, then another one that finds it done.
    platform.trigger(*asked)
    assert "/models/asked-small/versions/1" in platform.trigger(*asked[:-1]).stdout
    assert len(platform.versions("asked-small")) == 1


def test_the_end_of_the_run_is_the_exit_code(platform):
    revision = platform.add_model("refused")
    gate = platform.trigger("--model", revision.model, "--recipe", "impossible", ends=NOT_PASSED)
    assert "gate not passed by refused-impossible version 1" in gate.stdout and "MLflow: http" in gate.stdout
    failed = platform.trigger("--model", "/etc", "--recipe", "small", ends=FAILED)
    assert "neither in the list of base models" in failed.stdout
    for wrong, told in [
        (["--deployment", "no/such"], "not on the server"),
        (["--deployment", "such"], "expected FLOW/DEPLOYMENT"),
        (["--model", "a/b", "--recipe", "../x"], "parameters are refused"),
        (["--model", "a/b", "--set", "no_such=1"], "takes no 'no_such'"),
        (["--model", "a/b", "--set", "questions"], "expected KEY=JSON"),
    ]:
        refused = platform.bivlm("trigger", *wrong)
        assert refused.returncode == BAD_INPUT and told in refused.stderr, refused.stderr
    away = platform.bivlm("trigger", "--model", "a/b", PREFECT_API_URL=f"http://127.0.0.1:{free_port()}/api")
    assert away.returncode == FAILED and "no Prefect server answers" in away.stderr
    assert "PREFECT_API_URL is not set" in platform.bivlm("trigger", "--model", "a/b", PREFECT_API_URL="").stderr


def test_a_folder_that_appears_becomes_a_version_by_its_event_once(platform):
    revision = platform.add_model("new")
    platform.look("watch/watch")
    (version,) = _wait_until(lambda: platform.versions("new-small"))
    _wait_until(lambda: "bivlm.recorded" in platform.versions("new-small")[0].tags)
    assert version.tags["bivlm.trigger"] == f"event {revision.event_id}"
    assert version.tags["bivlm.base.sha256"] == revision.revision

    def runs():
        asked = [each for each in platform.post("flow_runs/filter") if "event_id" in each["parameters"]]
        return [each["state_type"] for each in asked if each["parameters"]["event_id"] == str(revision.event_id)]

    _wait_until(lambda: runs() == ["COMPLETED"])
    platform.look("watch/watch")
    assert runs() == ["COMPLETED"]


def test_a_registered_version_is_evaluated_and_the_results_added_to_it(platform):
    revision = platform.add_model("judged")
    platform.trigger("--model", revision.model, "--recipe", "small", "--no-evaluate")
    (version,) = platform.versions("judged-small")
    before = platform.registry.get_logged_model(version.tags["bivlm.model_id"]).metrics or []
    asked = ("--deployment", "evaluate-version/evaluate-version", "--set")
    done = platform.trigger(*asked, 'version="judged-small@candidate"')
    assert f"/runs/{version.run_id}" in done.stdout
    metrics = platform.registry.get_logged_model(version.tags["bivlm.model_id"]).metrics
    assert {metric.key for metric in metrics} - {metric.key for metric in before} >= {"accuracy", "questions"}
    missing = platform.trigger(*asked, 'version="no-such-model/1"', ends=FAILED)
    assert "not in the registry" in missing.stdout


def test_the_nightly_run_compresses_what_is_listed_and_not_yet_made(platform):
    platform.add_model("nightly")
    platform.look("nightly/nightly")
    (version,) = platform.versions("nightly-small")
    assert "nightly" in version.tags["bivlm.trigger"]


def test_the_weekly_run_makes_the_boards_that_are_listed(platform):
    revision = platform.add_model("compared")
    list_file = platform.place / "base-models.yaml"
    before = list_file.read_text()
    entry = {"model": revision.model, "recipes": ["small"], "leaderboard": ["small", "impossible"]}
    list_file.write_text(yaml.safe_dump({"format": 1, "models": [entry]}))
    platform.look("weekly-leaderboards/weekly")
    list_file.write_text(before)
    (board,) = (platform.place / "outputs" / "leaderboards").glob(f"*/{revision.revision[:16]}/board.json")
    assert {each["recipe"] for each in json.loads(board.read_text())["entries"]} == {"small", "impossible"}
