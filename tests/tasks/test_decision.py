"""What a gate's decision does to a version that was decided about before."""

import pytest
from mlflow import MlflowClient

from bivlm.evaluation.gate import Decision
from bivlm.evaluation.paired import LargestLoss
from tasks.tracking.promotion import apply_decision
from tasks.tracking.run import Tracking

NAME, MORE, FEWER = "llava-small", 1000, 100


@pytest.fixture(scope="module")
def registry(tmp_path_factory):
    """A registry in a file, its experiment and a run."""
    place = tmp_path_factory.mktemp("registry")
    client = MlflowClient(f"sqlite:///{place}/mlflow.db")
    experiment = client.create_experiment("bivlm", artifact_location=place.as_uri())
    return client, experiment, client.create_run(experiment).info.run_id


@pytest.fixture
def decide(registry, tmp_path, monkeypatch):
    """Decide about the one version of a registered model of the test's own: passed or not, after so many questions."""
    monkeypatch.setenv("BIVLM_CACHE", str(tmp_path / "cache"))
    client, experiment, run = registry
    name = f"{NAME}-{tmp_path.name}"
    client.create_registered_model(name)
    tags = {"bivlm.model_id": "m-1", "bivlm.recorded": "2026-11-24", "bivlm.gate": "not decided"}
    client.create_model_version(name, tmp_path.as_uri(), run, tags=tags)
    model = client.create_logged_model(experiment, name="x", source_run_id=run).model_id

    def decide(passed, questions):
        reasons = (f"{'passed' if passed else 'refused'} after {questions}",)
        decision = Decision(passed, reasons, () if passed else reasons)
        losses = {"b": LargestLoss(questions, 0.0, 3.0, 0.95, 0, 0)}
        return apply_decision.fn(
            Tracking(client.tracking_uri, experiment, run, "r", "l", "t"), name, 1, decision, losses, model
        )

    decide.standing = lambda: (
        client.get_model_version(name, "1").tags["bivlm.gate"],
        client.get_registered_model(name).aliases.get("champion"),
    )
    return decide


def test_a_refusal_is_not_undone_by_fewer_questions(decide):
    assert decide(False, MORE).said == "no version is champion"
    found = decide(True, FEWER)
    assert found.champion is None
    assert found.said == "no version is champion: it was refused after 1000 questions, and these are 100"
    assert decide.standing() == ("refused", None)
    assert decide(True, MORE).champion == 1
    assert decide.standing() == ("passed", 1)


def test_what_has_passed_is_not_undone_by_fewer_questions(decide):
    decide(True, MORE)
    assert decide(False, FEWER).said == "version 1 stays champion"
    assert decide.standing() == ("passed", 1)
    assert decide(True, FEWER).champion == 1


def test_a_version_is_decided_about_when_its_champion_has_moved_and_not_before(decide, monkeypatch):
    class CutOff(Exception):
        """The process is gone."""

    def gone(*_):
        raise CutOff

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "set_registered_model_alias", gone)
        with pytest.raises(CutOff):
            decide(True, MORE)
    assert decide.standing() == ("not decided", None)
    decide(True, MORE)
    assert decide.standing() == ("passed", 1)
