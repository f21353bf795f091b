"""A new base model, an event, a compression, a gate, a champion: with the real servers, a watcher and two workers.

Every test goes on where the one before it ended, as days go on one platform.
"""

from __future__ import annotations

import json
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_llava import make_tiny_llava

from infra.stack import Servers
from tests.integration.conftest import COMPONENTS, ask_about_colours, talk_about_colours
from tests.integration.platform_processes import Api, Worker, until

pytestmark = pytest.mark.integration
EVENT_STARTED, ASKED_FOR, NIGHTLY = "on-base-model/on-base-model", "on-base-model/on-request", "nightly/nightly"
DONE, FAILED, GATE_NOT_PASSED = 0, 1, 3


class Platform:
    """Models, recipes and outputs of a team, its two workers, and eyes for what has become of a model."""

    def __init__(self, servers: Servers, place: Path) -> None:
        self.servers, self.place = servers, place
        self.models, self.recipes, self.outputs = place / "models", place / "recipes", place / "outputs"
        for folder in (self.models, self.recipes, self.outputs):
            folder.mkdir(parents=True)
        listed = [{"model": f"{self.models}/*", "recipes": ["small"]}]
        (place / "base-models.yaml").write_text(yaml.safe_dump({"format": 1, "models": listed}))
        self.variables = {
            "BIVLM_BASE_MODELS": str(place / "base-models.yaml"),
            "BIVLM_MODELS": str(self.models),
            "BIVLM_RECIPES": str(self.recipes),
            "BIVLM_OUTPUTS": str(self.outputs),
        }
        self.api = Api(servers, place / "client")
        self.workers = [Worker(servers, pool, place / f"worker-{pool}", **self.variables) for pool in ("cpu", "gpu")]

    def appear(self, name: str, seed: int) -> Path:
        """A model's folder, put there as a whole."""
        made = make_tiny_llava(self.place / "made" / name, seed=seed)
        return Path(shutil.move(made, self.models / name))

    def look(self) -> None:
        """One look of the watcher, by its deployment; not while the one of its schedule is at work."""

        def looked() -> bool:
            state = self.api.wait(self.api.run("watch/watch", {"settled_seconds": 1}))
            assert state["type"] in ("COMPLETED", "CANCELLED"), state
            return state["type"] == "COMPLETED"

        until("a look of the watcher", looked)

    def pause_watcher(self) -> None:
        """No looks by its schedule from now on."""
        found = self.api.ask("GET", "/deployments/name/watch/watch")
        self.api.ask("PATCH", f"/deployments/{found['id']}", json={"paused": True})

    def run_of(self, deployment: str, model: Path) -> dict[str, Any]:
        """The run of a deployment that compresses `model`, once it has ended."""

        def found() -> dict[str, Any] | None:
            ours = [run for run in self.api.runs_of(deployment) if run["parameters"].get("model_id") == str(model)]
            return ours[0] if ours else None

        run = until(f"a run of {deployment} for {model}", found)
        return run | {"state": self.api.wait(run["id"])}

    def versions(self, name: str) -> list[tuple[Any, ...]]:
        """(version, status, champion?) of what the registry's tables hold of a model's name."""
        return self.api.rows(
            "mlflow",
            "SELECT v.version, v.status, EXISTS (SELECT FROM registered_model_aliases a WHERE a.name = v.name "
            "AND a.version = v.version AND a.alias = 'champion') FROM model_versions v "
            f"WHERE v.name = '{name}' ORDER BY v.version",
        )

    def tag(self, name: str, key: str, version: int = 1) -> str:
        ((value,),) = self.api.rows(
            "mlflow",
            f"SELECT value FROM model_version_tags WHERE name = '{name}' AND version = {version} AND key = '{key}'",
        )
        return value

    def weights_in_s3(self, name: str) -> bytes:
        """The packed weights of a logged model, from the files behind the S3 server."""
        ((place,),) = self.api.rows("mlflow", f"SELECT artifact_location FROM logged_models WHERE name = '{name}'")
        folder = self.servers.folder / "s3" / "mlflow" / place.partition("mlflow-artifacts:/")[2].lstrip("/")
        (file,) = folder.rglob("model.safetensors")
        return file.read_bytes()


@pytest.fixture(scope="module")
def platform(stack, tmp_path_factory):
    place = tmp_path_factory.mktemp("platform")
    platform = Platform(stack, place)
    recipe = {
        "name": "small",
        "format": 1,
        "components": {part: {"method": "bivlm", "groups": 2, "p_max": 0.05} for part in COMPONENTS},
        "calibration": {
            "source": str(talk_about_colours(place / "conversations")),
            "samples": 3,
            "held_out": 2,
            "seed": 0,
        },
        "evaluation": [f"vqa:{ask_about_colours(place / 'questions')}"],
        "gate": {"bits": {"linears": 16.0}},  # a random model is at chance: a gate on its accuracy refuses
    }
    (platform.recipes / "small.yaml").write_text(yaml.safe_dump(recipe))
    strict = recipe | {"name": "strict", "gate": {"bits": {"linears": 0.5}}}
    (platform.recipes / "strict.yaml").write_text(yaml.safe_dump(strict))
    platform.api.deploy_all()
    for worker in platform.workers:
        worker.start()
    yield platform
    for worker in platform.workers:
        worker.kill()


def test_a_new_model_folder_becomes_a_champion_by_itself(platform):
    model = platform.appear("first", seed=1)
    platform.look()  # seen, and not yet known to stay as it is
    platform.look()
    run = platform.run_of(EVENT_STARTED, model)
    assert run["state"]["type"] == "COMPLETED", run["state"]
    assert platform.versions("first-small") == [(1, "READY", True)]
    assert platform.tag("first-small", "bivlm.trigger").startswith("event ")

    (packed,) = platform.outputs.rglob("model.safetensors")
    assert platform.weights_in_s3("first-small") == packed.read_bytes()
    revision = run["parameters"]["revision"]
    assert json.loads((packed.parent / "lineage.json").read_text())["base_model"]["sha256"] == revision
    steps = platform.servers.folder / "s3" / "bivlm" / "workspace" / "steps"
    assert len(list(steps.iterdir())) > 30
    assert platform.api.rows("mlflow", "SELECT count(*) FROM latest_metrics")[0][0] > 20
    names = "SELECT f.name, r.state_type::text FROM flow_run r JOIN flow f ON f.id = r.flow_id"
    assert ("on-base-model", "COMPLETED") in platform.api.rows("prefect", names)


def test_nothing_is_compressed_twice(platform):
    runs = len(platform.api.runs_of(EVENT_STARTED))
    platform.look()
    platform.look()
    assert len(platform.api.runs_of(EVENT_STARTED)) == runs
    assert platform.versions("first-small") == [(1, "READY", True)]


def test_the_command_for_ci_starts_follows_and_names_the_page(platform):
    model = platform.appear("second", seed=2)
    command = ["trigger", "--model", str(model), "--recipe", "small", "--wait"]
    done = platform.api.bivlm(*command, **platform.variables)
    assert platform.versions("second-small") == [(1, "READY", True)]
    assert f"{platform.servers.address('mlflow')}/#/experiments/" in done.stdout
    again = platform.api.bivlm(*command, **platform.variables)
    assert again.returncode == DONE
    assert platform.versions("second-small") == [(1, "READY", True)]


def test_what_its_gate_does_not_pass_ends_red_with_the_reason(platform):
    model = platform.models / "second"
    command = ["trigger", "--model", str(model), "--recipe", "strict", "--wait"]
    done = platform.api.bivlm(*command, check=False, **platform.variables)
    assert done.returncode == GATE_NOT_PASSED, done.stdout + done.stderr
    assert "more than the bound of 0.5" in done.stdout + done.stderr
    assert platform.versions("second-strict") == [(1, "READY", False)]
    assert platform.versions("second-small") == [(1, "READY", True)]


def test_a_schedule_compresses_what_nobody_has_asked_for(platform):
    platform.appear("third", seed=3)
    platform.look()  # at the next one it would be settled, and an event: the schedule is to come first
    platform.pause_watcher()
    # Again and again, because a busy server's scheduler may come too late for the first time, and makes up for nothing.
    soon = datetime.now(UTC) + timedelta(seconds=45)
    each_minute = {"interval": 60, "anchor_date": soon.isoformat()}
    schedule = {"schedule": each_minute, "active": True, "parameters": {"settled_seconds": 0}}
    found = platform.api.ask("GET", f"/deployments/name/{NIGHTLY}")
    before = {run["id"] for run in platform.api.runs_of(NIGHTLY) if run["state"]["type"] != "SCHEDULED"}
    (made,) = platform.api.ask("POST", f"/deployments/{found['id']}/schedules", json=[schedule])

    def begun() -> list[dict[str, Any]]:
        return [
            run
            for run in platform.api.runs_of(NIGHTLY)
            if run["state"]["type"] != "SCHEDULED" and run["id"] not in before
        ]

    run, *_ = until("a scheduled run", begun)
    platform.api.ask("DELETE", f"/deployments/{found['id']}/schedules/{made['id']}")
    assert platform.api.wait(run["id"])["type"] == "COMPLETED"
    assert run["auto_scheduled"]
    assert platform.versions("third-small") == [(1, "READY", True)]
    assert platform.tag("third-small", "bivlm.trigger").startswith("schedule")
