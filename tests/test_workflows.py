"""GitHub's workflows: what somebody types is never part of a script, and secrets go to the one step that needs them."""

from pathlib import Path

import pytest
import yaml

FOLDER = Path(__file__).parents[1] / ".github" / "workflows"


def workflow(name):
    return yaml.safe_load((FOLDER / name).read_text())


def steps(name):
    return [step for job in workflow(name)["jobs"].values() for step in job["steps"]]


@pytest.mark.parametrize("name", sorted(path.name for path in FOLDER.iterdir()))
def test_nothing_is_put_into_a_script_and_the_token_may_only_read(name):
    assert workflow(name)["permissions"] == {"contents": "read"}
    assert not [step for step in steps(name) if "${{" in step.get("run", "")]
    assert all(
        step["with"]["persist-credentials"] is False for step in steps(name) if "checkout" in step.get("uses", "")
    )


def test_all_three_ways_lead_to_one_command_with_the_secrets_in_its_step_alone():
    # YAML 1.1 reads the key `on` as true.
    assert workflow("compress.yaml")[True].keys() == {"workflow_dispatch", "repository_dispatch", "schedule"}
    (step,) = [step for step in steps("compress.yaml") if "bivlm trigger" in step.get("run", "")]
    assert [each for each in steps("compress.yaml") if "secrets." in str(each)] == [step]
    assert step["shell"] == "bash"  # which GitHub runs with pipefail: the exit code is the command's, not that of tee
    for name in ("MODEL", "REVISION", "RECIPE"):
        assert f'="${name}"' in step["run"] and "github.event.client_payload" in step["env"][name]


def test_a_request_does_not_cancel_another_that_waits():
    """GitHub keeps one waiting job of a concurrency group, the last one."""
    found = workflow("compress.yaml")
    assert "concurrency" not in found and all("concurrency" not in job for job in found["jobs"].values())


def test_an_empty_input_is_none_and_one_that_looks_like_an_option_is_a_value(monkeypatch):
    from flows.cli import follow as triggering
    from flows.cli.main import main

    asked = []
    monkeypatch.setattr(triggering, "start", lambda *given, **_: asked.append(given) or (None, "page"))
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_REPOSITORY", "owner/repo")
    monkeypatch.setenv("GITHUB_RUN_ID", "7")
    assert main(["trigger", "--model=--deployment=other", "--revision=", "--recipe="]) == 0
    ((deployment, parameters),) = asked
    assert deployment == "on-base-model/on-request"
    assert {key: value for key, value in parameters.items() if value is not None} == {
        "model": "--deployment=other",
        "trigger": "ci owner/repo run 7",
    }
