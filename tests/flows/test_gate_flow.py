"""The end of a compression whose recipe has a gate, and what happens to the champion."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
from prefect.client.orchestration import get_client
from prefect.states import StateType

from bivlm.errors import GateNotPassed, InputError
from bivlm.evaluation.benchmark import load_benchmark
from bivlm.evaluation.generation import load_model
from bivlm.evaluation.outcomes import evaluate
from bivlm.reports.bits import bits_of
from bivlm.reports.lineage import read_lineage
from bivlm.reports.pushing import package
from flows.cli import main as cli
from flows.cli.commands import NOT_PASSED
from tasks.runtime.states import GATE_STATE

NAME = "llava-small"
PASSES, REFUSES = {"largest_loss": 100.0}, {"largest_loss": 2.0}


def gated(compression, accuracy=None, bits=None, **changes):
    """Compress with a gate; another bound is another recipe, and so another version."""
    compression.recipe["gate"] = {key: value for key, value in (("accuracy", accuracy), ("bits", bits)) if value}
    return compression.run(**changes)


def aliases(compression) -> dict[str, int]:
    return {alias: int(version) for alias, version in compression.client.get_registered_model(NAME).aliases.items()}


def version(compression, number):
    return compression.client.get_model_version(NAME, str(number))


def run_of(compression, number):
    return compression.client.get_run(version(compression, number).run_id)


@pytest.fixture(scope="session")
def mastered(compressed, questions, tmp_path_factory) -> str:
    """The four questions once more; what the tiny model answers, in full precision and packed, is right."""
    folder = shutil.copytree(questions, tmp_path_factory.mktemp("mastered") / "mastered")
    asked = load_benchmark(f"vqa:{questions}")
    said = [evaluate(*load_model(each), asked).outcomes["prediction"] for each in (compressed.model, compressed.output)]
    lines = [json.loads(line) for line in (folder / "data.jsonl").read_text().splitlines()]
    for line, answers in zip(lines, zip(*said, strict=True), strict=True):
        line["answers"] = list(dict.fromkeys(answers))
    (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return f"vqa:{folder}"


@pytest.fixture
def new_fit_compression(new_compression, mastered):
    """As `new_compression`, with questions that the tiny model answers above chance."""

    def make(place):
        compression = new_compression(place)
        compression.recipe["evaluation"] = [mastered]
        return compression

    return make


@pytest.fixture(scope="module")
def promoted(new_compression, mastered, tmp_path_factory):
    """The tiny model with a gate that it has passed; look, do not touch."""
    compression = new_compression(tmp_path_factory.mktemp("promoted"))
    compression.recipe["evaluation"] = [mastered]
    gated(compression, PASSES, {"linears": 16.0}, trigger="ci makers/models run 12")
    return compression


def test_a_candidate_that_passes_its_gate_is_champion(promoted):
    (result,) = promoted.results
    assert aliases(promoted) == {"candidate": 1, "champion": 1}
    (task,) = promoted.recipe["evaluation"]
    stored = bits_of(promoted.output)["linears"]["stored"]
    found = result["gate"]
    assert (found["passed"], found["champion"], found["previous"]) == (True, 1, None)
    assert [reason.partition(":")[0] for reason in found["reasons"]] == [
        f"accuracy on {task.partition(':')[0]}",
        "stored bits in the linears",
    ]
    assert f"{stored:.3f}" in found["reasons"][1]


def test_the_decision_stands_on_the_run_and_on_the_version_with_its_figures(promoted):
    tags, run = version(promoted, 1).tags, run_of(promoted, 1)
    assert tags["bivlm.gate"] == run.data.tags["bivlm.gate"] == "passed"
    assert tags["bivlm.gate.reasons"] == "; ".join(promoted.results[0]["gate"]["reasons"])
    assert run.info.status == "FINISHED"
    lost = {key: value for key, value in run.data.metrics.items() if key.startswith("gate/")}
    (loss,) = promoted.results[0]["evaluation"]["loss"].values()
    assert sorted(key.rsplit("/")[-1] for key in lost) == ["lost", "lost_at_most"]
    assert next(value for key, value in lost.items() if key.endswith("lost")) == loss["loss"]
    (score,) = (json.loads(value) for key, value in tags.items() if key.startswith("bivlm.accuracy."))
    assert (score["lost"], score["low"], score["high"]) == (loss["loss"], loss["low"], loss["high"])
    (move,) = (json.loads(tags[key]) for key in tags if key.startswith("bivlm.move."))
    assert (move["from"], move["to"], move["who"], move["kind"]) == (None, 1, "gate", "gate")
    assert move["why"] == tags["bivlm.gate.reasons"]


def test_what_asked_for_it_stands_everywhere(promoted):
    said = "ci makers/models run 12"
    client, found = promoted.client, version(promoted, 1)
    run = client.get_run(found.run_id)
    assert {found.tags["bivlm.trigger"], run.data.tags["bivlm.trigger"], read_lineage(promoted.output).trigger} == {
        said
    }
    assert client.get_logged_model(found.tags["bivlm.model_id"]).tags["bivlm.trigger"] == said
    assert said in run.data.tags["mlflow.note.content"]
    assert said in found.description


def test_an_identical_request_keeps_champion_history_and_pages(promoted):
    before = [promoted.client.get_registered_model(NAME), version(promoted, 1)]
    again = promoted.run(trigger="by somebody else")
    assert (again["gate"]["champion"], again["gate"]["said"]) == (1, "version 1 is champion already")
    after = [promoted.client.get_registered_model(NAME), version(promoted, 1)]
    assert [(each.tags, each.description) for each in after] == [(each.tags, each.description) for each in before]
    run = run_of(promoted, 1)
    history = promoted.client.get_metric_history(run.info.run_id, next(k for k in run.data.metrics if "at_most" in k))
    assert len(history) == 1
    promoted.results.pop()


def test_a_candidate_that_does_not_pass_ends_red_and_the_champion_stays(
    new_fit_compression, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "200")
    compression = new_fit_compression(tmp_path)
    gated(compression, PASSES)
    with pytest.raises(
        GateNotPassed, match=r"with 95 % confidence at most .*: more than the 2 that may be lost"
    ) as red:
        gated(compression, REFUSES)
    assert "version 1 stays champion" in str(red.value)
    assert red.value.result["gate"]["passed"] is False
    assert (red.value.result["gate"]["champion"], red.value.result["gate"]["previous"]) == (1, 1)
    assert red.value.result["mlflow"]["version"] == 2
    assert aliases(compression) == {"candidate": 2, "champion": 1}
    # All of it was recorded: the run did not fail, its candidate was refused.
    assert run_of(compression, 2).info.status == "FINISHED"
    for tags in (version(compression, 2).tags, run_of(compression, 2).data.tags):
        assert tags["bivlm.gate"] == "refused"
        assert "too few questions to tell: answered alike, about 150 would do" in tags["bivlm.gate.reasons"]
    (latest, *_) = _flow_runs()
    assert (latest.state.type, latest.state.name) == (StateType.FAILED, GATE_STATE)
    assert "more than the 2 that may be lost" in latest.state.message

    assert cli.main(["compress", *compression.arguments()]) == NOT_PASSED
    printed = capsys.readouterr()
    assert "gate NOT PASSED: version 1 stays champion" in printed.out
    assert "packed linears" in printed.out
    assert printed.err.splitlines()[-1].startswith(f"bivlm compress: gate not passed by {NAME} version 2: accuracy on ")
    assert "Traceback" not in printed.err

    # What a gate has refused takes a word by hand.
    arguments = ["--why", "a demonstration", "--who", "ann", "--workspace", str(compression.workspace)]
    assert cli.main(["promote", f"{NAME}/2", *arguments]) == cli.BAD_INPUT
    assert f"{NAME}/2: its gate has refused: accuracy on" in capsys.readouterr().err
    assert cli.main(["promote", f"{NAME}/2", "--although-refused", *arguments]) == cli.DONE
    assert capsys.readouterr().out == f"{NAME}: version 2 is champion, version 1 was; by ann: a demonstration\n"
    assert cli.main(["rollback", NAME, *arguments]) == cli.DONE
    assert aliases(compression) == {"candidate": 2, "champion": 1}
    assert "was champion until" in version(compression, 2).description


@pytest.mark.slow
def test_a_gate_refuses_a_set_on_which_full_precision_is_at_chance_and_everything_says_so(
    new_fit_compression, new_compression, questions, tmp_path, capsys, monkeypatch
):
    """The random model answers none of the four questions: nothing is lost, and nothing is known."""
    monkeypatch.setenv("COLUMNS", "1000")
    compression = new_fit_compression(tmp_path)
    gated(compression, PASSES)
    compression.recipe["evaluation"] = [f"vqa:{questions}"]
    said = (
        f"vqa:{questions}: full precision scores 0.0 %, chance is 50.0 %: these questions do not measure this model; "
        "check their answers and the chat template, or ask others"
    )
    with pytest.raises(GateNotPassed) as red:
        gated(compression, PASSES)
    assert f"accuracy on {said}; version 1 stays champion" in str(red.value)
    assert aliases(compression) == {"candidate": 2, "champion": 1}

    result = red.value.result
    assert said in result["warnings"]
    assert result["warnings"] == compression.report()["warnings"]
    (found,) = result["evaluation"]["at_chance"]
    assert (found["task"], found["n"], found["accuracy"], found["chance"]) == (f"vqa:{questions}", 4, 0.0, 50.0)
    page = (compression.output / "report.html").read_text()
    assert said in page and "Full precision is not above chance on 1 of 1 benchmarks" in page
    tags, run = version(compression, 2).tags, run_of(compression, 2).data
    assert tags["bivlm.not_above_chance"] == run.tags["bivlm.not_above_chance"] == said
    assert said in run.tags["mlflow.note.content"]
    logged = compression.client.download_artifacts(version(compression, 2).run_id, "compression_report.json", tmp_path)
    assert json.loads(Path(logged).read_text()) == compression.report()
    assert "full precision scores 0.0 %" in version(compression, 2).description
    assert "not above chance" in compression.client.get_registered_model(NAME).description
    source = Path(compression.recipe["calibration"]["source"])
    assert tags["bivlm.kl.samples"] == f"2 held-out samples of {source}"
    assert version(compression, 1).tags["bivlm.not_above_chance"] == "none"

    card = package(compression.output, "owner/name").card
    assert f"- vqa:{questions.name}: full precision scores 0.0 %, chance is 50.0 %" in card
    assert f"on 2 held-out samples of {source.name}, which calibration has not seen." in card
    assert str(questions) not in card and str(source) not in card

    assert cli.main(["compress", *compression.arguments()]) == NOT_PASSED
    printed = capsys.readouterr().out
    assert f"warning: {said}" in printed and f"gate: accuracy on {said}" in printed
    assert f"nats per token, on 2 held-out samples of {source}" in printed


def _flow_runs():
    from prefect.client.schemas.filters import FlowFilter, FlowFilterName
    from prefect.client.schemas.sorting import FlowRunSort

    with get_client(sync_client=True) as client:
        return client.read_flow_runs(
            flow_filter=FlowFilter(name=FlowFilterName(any_=["compress"])), sort=FlowRunSort.START_TIME_DESC, limit=5
        )


@pytest.mark.slow
def test_a_gate_goes_forwards_only(new_fit_compression, tmp_path):
    compression = new_fit_compression(tmp_path)
    first, second = {"largest_loss": 100.0}, {"largest_loss": 99.0}
    gated(compression, first)
    assert gated(compression, second)["gate"]["previous"] == 1
    assert aliases(compression) == {"candidate": 2, "champion": 2}

    asked_again = gated(compression, first)
    assert asked_again["mlflow"]["version"] == 1
    assert asked_again["gate"]["said"].startswith("version 1 was champion before, and version 2 is now")
    assert aliases(compression) == {"candidate": 2, "champion": 2}

    assert cli.main(["rollback", NAME, "--why", "slow", "--workspace", str(compression.workspace)]) == cli.DONE
    taken_back = gated(compression, second)
    assert taken_back["gate"]["passed"] and taken_back["gate"]["champion"] == 1
    assert aliases(compression) == {"candidate": 2, "champion": 1}

    assert gated(compression, {"largest_loss": 98.0})["gate"]["previous"] == 1
    assert aliases(compression) == {"candidate": 3, "champion": 3}


def test_a_gate_on_accuracy_without_an_evaluation_is_refused_before_any_work(new_compression, tmp_path, counted):
    compression = new_compression(tmp_path)
    with pytest.raises(InputError, match=r"recipe small: its gate bounds the accuracy .* takes an evaluation"):
        gated(compression, PASSES, evaluate=False)
    assert counted == {stage: [] for stage in counted}
    assert gated(compression, bits={"linears": 16.0}, evaluate=False)["gate"]["champion"] == 1


def test_a_compression_without_a_gate_moves_no_champion(compressed):
    assert compressed.results[0]["gate"] is None
    assert aliases(compressed) == {"candidate": 1}
    assert "bivlm.gate" not in version(compressed, 1).tags
    assert "the recipe has none" in version(compressed, 1).description
    assert version(compressed, 1).tags["bivlm.trigger"] == "by hand"


@pytest.mark.slow
def test_a_decision_after_fewer_questions_does_not_take_the_place_of_one_after_more(new_fit_compression, tmp_path):
    compression = new_fit_compression(tmp_path)
    bound = {"largest_loss": 60.0}  # four questions without a change leave 53 points, one leaves 95
    gated(compression, bound)
    with pytest.raises(GateNotPassed, match="version 1 stays champion"):
        gated(compression, bound, questions=1)
    assert version(compression, 1).tags["bivlm.gate"] == "passed"
    assert aliases(compression)["champion"] == 1


def test_the_message_of_a_gate_travels_between_processes():
    error = pickle.loads(pickle.dumps(GateNotPassed("too much", {"version": 2})))
    assert (str(error), error.result) == ("too much", {"version": 2})
