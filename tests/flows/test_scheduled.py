"""What the clock starts: the list of base models at night, its leaderboards once a week."""

import json
from pathlib import Path

import pytest
import yaml

from bivlm.checkpoint.reading import Checkpoint
from flows.scheduled import SomeFailed, nightly_flow, watch_flow, weekly_flow


@pytest.mark.slow
def test_the_night_makes_what_is_not_made_once_and_tells_of_what_it_could_not(listed, tmp_path):
    night = {"settled_seconds": 0, "evaluate": False}
    assert nightly_flow(**night).made == {}  # seen for the first time: it may still be arriving
    (made,) = nightly_flow(**night).made.values()
    assert made == "llava-small/1"
    assert list(nightly_flow(**night).made.values()) == ["llava-small/1"]
    troubled = {"model": f"{tmp_path}/none/*", "recipes": ["small"]}
    write_list(tmp_path, [troubled, {"model": listed[1], "recipes": ["small"]}])
    with pytest.raises(SomeFailed, match=r"1 failed:\n  .*no such folder"):
        nightly_flow(**night)


def test_an_empty_list_is_a_sentence_that_names_the_file(listed, tmp_path, caplog):
    write_list(tmp_path, [])
    said = f"no base models are watched; write them into {tmp_path / 'list.yaml'}"
    for flow, made in ((nightly_flow, "made"), (weekly_flow, "made"), (watch_flow, "emitted")):
        caplog.clear()
        with caplog.at_level("INFO", logger="prefect.flow_runs"):
            assert not getattr(flow(settled_seconds=0), made)
        assert [record.message for record in caplog.records].count(said) == 1


@pytest.mark.slow
def test_the_week_makes_a_board_of_every_listed_model_that_has_one(listed, tmp_path):
    compression, model = listed
    components = {part: {"method": "rtn", "group_size": 32} for part in compression.recipe["components"]}
    rounded = compression.recipe | {"name": "rounded", "components": components}
    (tmp_path / "rounded.yaml").write_text(yaml.safe_dump(rounded))
    with_board = {"model": model, "recipes": ["small"], "leaderboard": ["small", "rounded"]}
    without = {"model": str(compression.model), "recipes": ["small"]}
    troubled = {"model": f"{tmp_path}/none/*", "recipes": ["small"], "leaderboard": ["small"]}
    write_list(tmp_path, [with_board, without])
    week = {"settled_seconds": 0, "questions": 2}
    assert weekly_flow(**week).made == {}  # seen for the first time: it may still be arriving
    made = weekly_flow(**week).made
    ((name, folder),) = made.items()
    assert name == f"{model} at {Checkpoint.open(model).digest()[:12]}"
    assert Path(folder).is_relative_to(tmp_path / "outputs" / "leaderboards")
    board = json.loads((Path(folder) / "board.json").read_text())
    assert {entry["recipe"] for entry in board["entries"]} == {"small", "rounded"}

    # An entry for every model of a folder, and one of them with a board of its own; and a folder that is not there.
    every = {"model": f"{tmp_path}/models/*", "recipes": ["small"], "leaderboard": ["small"]}
    write_list(tmp_path, [troubled, every, with_board])
    with pytest.raises(SomeFailed, match=r"1 failed:\n  .*no such folder"):
        weekly_flow(**week)
    assert json.loads((Path(folder) / "board.json").read_text()) == board


def write_list(place, models):
    (place / "list.yaml").write_text(yaml.safe_dump({"format": 1, "models": models}))
