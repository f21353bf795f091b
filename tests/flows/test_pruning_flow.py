"""Sweeps and redundancy on a tiny model: what is written, that it resumes, and what is refused beforehand."""

import json
import time

import pandas as pd
import pytest
from mlflow import MlflowClient
from tiny_llava import make_tiny_llava

from bivlm.errors import InputError
from bivlm.reports.pruning_tables import ROW
from flows.cli import main as cli
from tasks import pruning
from tests.flows.running import Running

PARAMS = {"model": "one", "place": "language", "score": "attention", "layer": "1", "share": "0.5"}
SWEEP = {"places": ["vision", "language", "joint"], "layers": [1], "shares": [0.25, 0.5]}


@pytest.fixture
def swept(tmp_path, questions, monkeypatch):
    """A function that sweeps two tiny models in one workspace."""
    models = [str(make_tiny_llava(tmp_path / name, seed=seed)) for name, seed in (("one", 0), ("other", 1))]
    monkeypatch.setenv("BIVLM_CACHE", str(tmp_path / "cache"))

    def run(**changes):
        from flows.pruning import sweep_flow

        arguments = {"models": models, "benchmarks": [f"vqa:{questions}", "reference:choice"], "quiet": True}
        arguments |= {"output": str(tmp_path / "out"), "workspace": str(tmp_path / "workspace")}
        return sweep_flow(**arguments | {"sweep": {**SWEEP, "questions": 4}} | changes)

    run.models = models
    return run


@pytest.mark.slow
def test_a_sweep_has_every_cell_and_is_the_same_twice(swept, tmp_path, monkeypatch):
    result = swept()
    table = pd.read_csv(tmp_path / "out" / "sweep.csv")
    assert tuple(table.columns) == ROW
    assert len(table) == 2 * 6 * 3  # models, cells, two tasks and both together
    assert set(table["task"]) == {"reference:choice", "all"} | set(table["task"][table["task"].str.startswith("vqa:")])
    assert (table[table["task"] == "all"]["n"] == 8).all()
    image = table[(table["place"] == "language") & (table["share"] == 0.25) & (table["task"] != "all")]
    assert image["kept_image"].between(0.7, 0.8).all()
    files = {path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert {str(file) for file in files} >= {"sweep.csv", "baselines.json", "losses.svg", "accuracy.svg"}
    assert sum(file.parts[0] == "tables" for file in files) == 2 * 3 * 3
    written = {file: (tmp_path / "out" / file).read_bytes() for file in files}
    client = MlflowClient(f"sqlite:///{tmp_path / 'workspace' / 'mlflow.db'}")
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    logged = client.search_runs(experiments)
    cells = [run for run in logged if run.data.tags["bivlm.role"] == "pruned"]
    assert len(cells) == len(logged) - 1 == 2 * 6
    assert {run.data.tags["mlflow.parentRunId"] for run in cells} == {result["run_id"]}
    assert len({run.data.params.pop("checkpoint") for run in cells}) == 2
    some = next(run for run in cells if run.data.params == PARAMS)
    row = table.query("model == 'one' and place == 'language' and share == 0.5 and task == 'all'").iloc[0]
    assert some.data.metrics["all/loss"] == pytest.approx(row["loss"], rel=1e-5)
    assert {file.path for file in client.list_artifacts(result["run_id"], "pruning")} >= {"pruning/sweep.csv"}
    monkeypatch.setattr(pruning, "evaluate", None)  # nothing is asked again
    swept()
    assert len(client.search_runs(experiments)) == len(logged)
    assert written == {file: (tmp_path / "out" / file).read_bytes() for file in files}


@pytest.mark.slow
def test_a_sweep_that_was_stopped_goes_on_at_the_cell_where_it_was(swept, monkeypatch):
    real, asked = pruning.evaluate, []

    def failing(*arguments, **options):
        if len(asked) == 5:
            raise RuntimeError("the power is gone")
        asked.append(1)
        return real(*arguments, **options)

    monkeypatch.setattr(pruning, "evaluate", failing)
    with pytest.raises(RuntimeError, match="the power is gone"):
        swept()
    monkeypatch.setattr(
        pruning, "evaluate", lambda *arguments, **options: asked.append(1) or real(*arguments, **options)
    )
    swept()
    assert len(asked) == 2 * 6 * 2


@pytest.mark.slow
def test_a_sweep_that_was_killed_goes_on_and_ends_with_the_same_bytes(swept, tmp_path):
    """By SIGKILL, each time a few cells later, until it gets through."""
    arguments = [
        "sweep",
        "--model",
        swept.models[0],
        "--task",
        "reference:choice",
        "--questions",
        "40",
        "--layers",
        "1",
    ]
    arguments += ["--places", "vision", "language", "--output", str(tmp_path / "killed")]
    steps, kills = tmp_path / "first" / "steps", 0
    for at_least in range(2, 40, 3):
        run = Running.command([*arguments, "--workspace", str(tmp_path / "first")], tmp_path / "log")
        while run.process.poll() is None and len(list(steps.glob("*.json"))) < at_least:
            time.sleep(0.005)
        if not run.kill():
            break
        kills += 1
    assert kills >= 3
    assert run.process.returncode == 0
    whole = [*arguments[:-1], str(tmp_path / "whole"), "--workspace", str(tmp_path / "second")]
    assert cli.main(whole) == 0
    for name in ("sweep.csv", "baselines.json", "losses.svg", "accuracy.svg"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    client = MlflowClient(f"sqlite:///{tmp_path / 'first' / 'mlflow.db'}")
    runs = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    assert len(runs) == 1 + 2 * 6  # none twice


@pytest.mark.slow
def test_an_adaptive_cell_is_compared_with_a_fixed_one_of_as_many_tokens(swept, tmp_path):
    sweep = {"places": ["language"], "layers": [1], "shares": [0.5], "masses": [0.5, 0.9], "questions": 4}
    rows = swept(sweep=sweep)["adaptive"]
    assert [(row["model"], row["mass"]) for row in rows] == [(m, s) for m in ("one", "other") for s in (0.5, 0.9)]
    for row in rows:
        assert row["gain"] == pytest.approx(row["fixed"] - row["adaptive"])
        assert row["n"] == 8
    assert rows[0]["kept_image"] < rows[1]["kept_image"] < 1
    assert len(pd.read_csv(tmp_path / "out" / "adaptive.csv")) == 4


@pytest.mark.slow
def test_a_share_that_leaves_no_token_is_a_gap_with_its_reason(swept, tmp_path):
    swept(sweep={"places": ["language"], "layers": [1], "shares": [0.5, 0.999], "questions": 2})
    table = pd.read_csv(tmp_path / "out" / "sweep.csv")
    refused = table[table["share"] == 0.999]
    assert refused["refused"].str.contains("leaves none of").all()
    assert refused["accuracy"].isna().all()
    assert table[table["share"] == 0.5]["accuracy"].notna().all()


def test_a_layer_out_of_range_is_refused_before_any_question(swept, monkeypatch):
    monkeypatch.setattr(pruning, "evaluate", None)
    with pytest.raises(InputError, match=r"pruning\.layer: found 7, expected 1 to"):
        swept(sweep={**SWEEP, "layers": [1, 7]})


def test_the_commands(swept, tmp_path, questions, capsys):
    arguments = ["--model", swept.models[0], "--task", f"vqa:{questions}", "--questions", "2"]
    arguments += ["--workspace", str(tmp_path / "workspace"), "--layers", "1"]
    place = ["--output", str(tmp_path / "swept"), "--places", "language", "--shares", "50%", "0.75"]
    assert cli.main(["sweep", *arguments, *place]) == 0
    said = capsys.readouterr().out
    assert "one: language, attention; accuracy in percent, without pruning" in said
    assert "75 %" in said
    # Two questions, one of which is answered by a constant.
    assert f"warning: vqa:{questions}: one scores 0.0 %, chance is 50.0 %: these questions do not measure" in said
    assert cli.main(["redundancy", *arguments, "--tolerance", "1%", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["found"]
    assert found["tolerance"] == 1.0
    assert "not resolvable with 2 questions" in found["in_words"]
    assert [(each["task"], each["chance"]) for each in found["at_chance"]] == [(f"vqa:{questions}", 50.0)]
    both = [*arguments, "--task", f"vqa:{questions}", "reference:choice"]
    assert cli.main(["redundancy", *both, "--tolerance", "50%"]) == 0
    said = capsys.readouterr().out
    assert "accuracy lost" in said
    assert [line.partition(",")[0] for line in said.splitlines() if ", language from layer 1: " in line][1:] == [
        "reference:choice",
        "all",
    ]
    with pytest.raises(SystemExit):
        cli.main(["sweep", *arguments, *place, "--shares", "1.5"])
    assert "expected a share from 0 up to but not 1" in capsys.readouterr().err
    by_place = ["--places", "vision", "language", "--layers", "vision=1", "language=1"]
    assert cli.main(["sweep", *arguments, *place, *by_place]) == 0
    assert "one: vision, attention" in capsys.readouterr().out
    assert cli.main(["sweep", *arguments, *place, "--layers", "vision=one"]) == 2
    assert "expected numbers, or PLACE=NUMBER" in capsys.readouterr().err
    assert cli.main(["sweep", *arguments, *place, "--places", "nowhere"]) == 2
    assert "places" in capsys.readouterr().err


@pytest.mark.slow
def test_a_recipe_may_carry_a_setting_and_ask_for_a_sweep(new_compression, tmp_path, questions, capsys, monkeypatch):
    monkeypatch.setenv("BIVLM_CACHE", str(tmp_path / "cache"))
    compression = new_compression(tmp_path / "place")
    setting = {"place": "language", "layer": 1, "share": 0.5}
    sweep = {"places": ["language"], "layers": [1], "shares": [0.25]}
    compression.recipe |= {"evaluation": [f"vqa:{questions}"], "pruning": {"setting": setting, "sweep": sweep}}
    compression.run()
    config = json.loads((compression.output / "config.json").read_text())
    assert config["quantization_config"]["pruning"] == {**setting, "mass": None, "score": "attention", "seed": 0}
    table = pd.read_csv(compression.output / "pruning" / "sweep.csv")
    assert table["model"].tolist() == ["full precision", compression.recipe["name"]]
    evaluated = [step["identity"]["recipe"] for step in compression.steps("evaluation")]
    assert sorted("pruning" in part for part in evaluated) == [False, False, True]  # both models plain for the sweep

    arguments = ["evaluate", "--model", str(compression.output), "--task", f"vqa:{questions}", "--json"]
    assert cli.main([*arguments, "--pruned"]) == 0
    assert json.loads(capsys.readouterr().out)["n"] == 4
    assert cli.main(["evaluate", "--model", str(compression.model), *arguments[3:], "--pruned"]) == 2
    assert "carries no pruning setting" in capsys.readouterr().err


def test_a_recipe_that_says_nothing_of_pruning_is_refused(new_compression, tmp_path):
    compression = new_compression(tmp_path)
    for wrong, said in (
        ({}, "expected a setting"),
        ({"place": "language", "layer": 0, "share": 0.5}, "pruning.setting.layer: .*from 1 on"),
        ({"sweep": {"shares": [1.0]}}, "pruning.sweep: .*less than 1"),
    ):
        compression.recipe["pruning"] = wrong
        with pytest.raises(InputError, match=said):
            compression.run()
