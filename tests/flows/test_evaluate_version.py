"""A registered version that is evaluated later, and the flow that goes over the list at night."""

import shutil

import pytest
import yaml

from bivlm.errors import InputError
from flows.base_model import on_base_model_flow
from flows.evaluate_version import evaluate_version_flow
from flows.scheduled import SomeFailed, nightly_flow


@pytest.fixture
def listed(new_compression, monkeypatch, tmp_path):
    """A workspace, and one listed model with a recipe of its own."""
    compression = new_compression(tmp_path)
    model = shutil.copytree(compression.model, tmp_path / "models" / "llava")
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(compression.recipe))
    entries = [{"model": str(model), "recipes": ["small"]}]
    (tmp_path / "list.yaml").write_text(yaml.safe_dump({"format": 1, "models": entries}))
    monkeypatch.setenv("BIVLM_BASE_MODELS", str(tmp_path / "list.yaml"))
    monkeypatch.setenv("BIVLM_RECIPES", str(tmp_path))
    monkeypatch.setenv("BIVLM_OUTPUTS", str(tmp_path / "outputs"))
    monkeypatch.setenv("BIVLM_WORKSPACE", str(compression.workspace))
    return compression, str(model)


def test_a_version_that_was_not_evaluated_is_and_its_results_are_linked_to_it(listed):
    compression, model = listed
    made = on_base_model_flow(model_id=model, recipe="small", evaluate=False)
    version = compression.client.get_model_version(*made["version"].split("/"))
    found = evaluate_version_flow(version="llava-small@candidate")
    (benchmark,) = compression.recipe["evaluation"]
    assert (found["version"], found["evaluation"][benchmark]["n"]) == ("llava-small/1", 4)
    assert found["page"].endswith(f"/runs/{version.run_id}")
    (child,) = compression.runs("packed")
    assert child.data.tags["mlflow.parentRunId"] == version.run_id
    assert child.data.metrics["accuracy"] == found["evaluation"][benchmark]["metrics"]["accuracy"]
    linked = compression.client.get_logged_model(version.tags["bivlm.model_id"]).metrics
    assert "accuracy" in {metric.key for metric in linked}
    again = evaluate_version_flow(version="llava-small/1", benchmarks=[benchmark])
    assert again["evaluation"][benchmark]["reused"] and len(compression.runs("packed")) == 1
    with pytest.raises(InputError, match="not in the registry"):
        evaluate_version_flow(version="llava-small/7")


def test_the_night_makes_what_is_not_made_once_and_tells_of_what_it_could_not(listed, tmp_path):
    night = {"settled_seconds": 0, "evaluate": False}
    assert nightly_flow(**night)["versions"] == {}  # seen for the first time: it may still be arriving
    (made,) = nightly_flow(**night)["versions"].values()
    assert made == "llava-small/1"
    assert list(nightly_flow(**night)["versions"].values()) == ["llava-small/1"]
    entries = yaml.safe_load((tmp_path / "list.yaml").read_text())
    entries["models"].insert(0, {"model": f"{tmp_path}/none/*", "recipes": ["small"]})
    (tmp_path / "list.yaml").write_text(yaml.safe_dump(entries))
    with pytest.raises(SomeFailed, match=r"1 failed:\n  .*no such folder"):
        nightly_flow(**night)
