"""The board of a tiny model: what is on it, that it is the same twice, and what cannot be on it."""

import json

import pytest
import yaml

from bivlm.errors import InputError
from bivlm.recipe.loading import load_recipe
from bivlm.reports.leaderboard.ranking import fingerprint
from flows.cli import main as cli
from flows.leaderboard import finished

METHODS = {
    "plain": {"method": "bivlm", "groups": 2, "p_max": 0.05},
    "rounded": {"method": "rtn", "group_size": 32},
    "fed-back": {"method": "gptq", "group_size": 32},
}


@pytest.fixture
def board_of(new_compression, tmp_path):
    """A function that makes the board of some recipes, in one workspace."""
    place = new_compression(tmp_path / "board")

    def make(recipes, **options):
        from flows.leaderboard import leaderboard_flow

        files = []
        for name, changes in recipes.items():
            file = tmp_path / f"{name}.yaml"
            file.write_text(yaml.safe_dump({**place.recipe, "name": name, **changes}))
            files.append(str(file))
        arguments = {"output": str(tmp_path / "out"), "workspace": str(place.workspace), **options}
        return leaderboard_flow(model=str(place.model), recipes=files, **arguments)

    make.place = place
    return make


def whole(settings):
    return {"components": dict.fromkeys(("vision", "adaptor", "language"), settings)}


@pytest.mark.slow
def test_every_recipe_is_on_the_board_and_the_board_is_the_same_twice(board_of, tmp_path):
    recipes = {name: whole(settings) for name, settings in METHODS.items()}
    first = board_of(recipes)
    assert {entry["recipe"] for entry in first["board"]["entries"]} == set(METHODS)
    by_name = {entry["recipe"]: entry for entry in first["board"]["entries"]}
    for name, entry in by_name.items():
        report = json.loads((tmp_path / "out" / name / "compression_report.json").read_text())
        assert entry["bits"]["stored"] == report["bits"]["linears"]["stored"]
        assert entry["relative_error"] == report["relative_error"]
    assert [by_name[name]["needs_calibration"] for name in METHODS] == [False, False, True]

    written = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.is_file()}
    assert set(written) == {"board.json", "board.md", "board.csv", "board.svg", ".bivlm-files"}
    second = board_of(recipes, output=str(tmp_path / "again"))
    assert second["fingerprint"] == first["fingerprint"]
    assert second["run_id"] == first["run_id"]
    assert json.loads(written["board.json"]) == first["board"]


@pytest.mark.slow
def test_a_recipe_that_cannot_be_carried_out_is_listed_with_the_reason(board_of):
    refused = whole(METHODS["plain"]) | {"keep": ["no.such.layer"]}
    result = board_of({"plain": whole(METHODS["plain"]), "refused": refused})
    assert [entry["recipe"] for entry in result["board"]["entries"]] == ["plain"]
    (failed,) = result["board"]["failed"]
    assert failed["recipe"] == "refused"
    assert "no.such.layer" in failed["reason"]


@pytest.mark.slow
def test_the_board_names_the_samples_of_its_kl_and_the_sets_on_which_the_model_is_at_chance(board_of, tmp_path, capsys):
    recipe = board_of.place.recipe
    samples = f"2 held-out samples of {recipe['calibration']['source']}"
    result = board_of({"plain": whole(METHODS["plain"])})
    assert f"KL in nats per token, on {samples}" in capsys.readouterr().err
    assert result["board"]["measured_on"] == samples
    (task,) = recipe["evaluation"]
    assert result["board"]["chance"]["accuracy"] == {task: 50.0}
    written = (tmp_path / "out" / "board.md").read_text()
    assert written.startswith(f"Warning: {task}: full precision scores 0.0 %, chance is 50.0 %: these questions do not")
    run = board_of.place.client.get_run(result["run_id"])
    assert run.data.tags["mlflow.note.content"].startswith(f"Warning: {task}: full precision")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"evaluation": []}, "recipe other: 'evaluation' is empty"),
        ({"evaluation": ["reference:open"]}, "everything on a board must be asked the same questions"),
        ({"calibration": {"samples": 1}}, "recipe other has other held-out samples than plain"),
        ({"name": "plain"}, "two are called 'plain'"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_any_work(board_of, changes, said):
    recipes = {"plain": whole(METHODS["plain"]), "other": whole(METHODS["rounded"]) | changes}
    with pytest.raises(InputError, match=said):
        board_of(recipes)
    assert not list((board_of.place.workspace / "steps").glob("*")) if board_of.place.workspace.exists() else True


@pytest.mark.slow
def test_other_linears_are_refused(board_of):
    recipes = {"plain": whole(METHODS["plain"]), "half": {"components": {"language": METHODS["plain"]}}}
    with pytest.raises(InputError, match="the recipes pack different linears"):
        board_of(recipes)


def test_the_command_prints_the_board_and_its_fingerprint(board_of, tmp_path, capsys):
    file = tmp_path / "plain.yaml"
    file.write_text(yaml.safe_dump({**board_of.place.recipe, "name": "plain", **whole(METHODS["plain"])}))
    arguments = ["--model", str(board_of.place.model), "--recipes", str(file), "--output", str(tmp_path / "out")]
    assert cli.main(["leaderboard", *arguments, "--workspace", str(board_of.place.workspace)]) == cli.DONE
    printed = capsys.readouterr().out
    board = json.loads((tmp_path / "out" / "board.json").read_text())
    assert "plain" in printed
    assert f"fingerprint: {fingerprint(board)}" in printed


def test_a_recipe_that_is_not_there_is_refused_before_anything_is_started(tmp_path, capsys):
    arguments = ["--model", str(tmp_path), "--recipes", "all", "nowhere", "--output", str(tmp_path / "out")]
    assert cli.main(["leaderboard", *arguments]) == cli.BAD_INPUT
    assert "recipe 'nowhere': no such file" in capsys.readouterr().err


def test_finishing_goes_to_every_recipe_that_has_none():
    recipe = load_recipe("rtn-w2g128")
    tuned = finished(recipe)
    assert (tuned.name, tuned.finish.objective) == ("rtn-w2g128-finished", "kl")
    assert finished(tuned) is tuned
