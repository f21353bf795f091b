"""A registered version that is evaluated later."""

import pytest

from bivlm.errors import InputError
from flows.base_model import on_base_model_flow
from flows.evaluate_version import evaluate_version_flow
from tasks import tracking


@pytest.mark.slow
def test_a_version_that_was_not_evaluated_is_and_its_results_are_linked_to_it(listed, monkeypatch):
    compression, model = listed
    made = on_base_model_flow(model_id=model, recipe="small", evaluate=False)
    version = compression.client.get_model_version(*made.version.split("/"))
    in_progress = []
    log_evaluation = tracking.log_evaluation

    def logged(*arguments):
        in_progress.extend((compression.workspace / "running").glob("*.began"))
        return log_evaluation(*arguments)

    monkeypatch.setattr(tracking, "log_evaluation", logged)
    found = evaluate_version_flow(version="llava-small@candidate")
    assert len(in_progress) == 1  # so that no collection takes what was just measured
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
