"""Folders of a run that lie in one another are refused where one would destroy the other."""

import os
import random
import tempfile
from pathlib import Path

import pytest

from bivlm.errors import InputError
from bivlm.recipe.loading import parse_recipe
from bivlm.workspace.places import Place, check_places, output_place, refuse_overlaps


def place_of(path, **options):
    return Place("here", Path(path), **options)


def is_refused(*places):
    try:
        refuse_overlaps(places)
    except InputError as error:
        assert "overlaps the" in str(error) and "; choose another folder for the " in str(error)
        return True
    return False


def on_the_way_up(path):
    """(device, inode) of a folder and of all above it, by ``..`` as the disk has it."""
    found, place = [], os.open(path, os.O_RDONLY)
    while True:
        here = os.fstat(place)
        found.append((here.st_dev, here.st_ino))
        above = os.open("..", os.O_RDONLY, dir_fd=place)
        os.close(place)
        place = above
        up = os.fstat(place)
        if (up.st_dev, up.st_ino) == found[-1]:
            os.close(place)
            return found


def check_pairs(seed, root, pairs=10):
    """Random paths over folders and links, some of which are not there yet; then made, and looked at."""
    chance = random.Random(seed)
    folders = [root]
    for number in range(chance.randint(2, 8)):
        folder = chance.choice(folders) / f"{'abc'[number % 3]}"
        folder.mkdir(exist_ok=True)
        folders.append(folder)
    for number in range(chance.randint(1, 4)):
        link = chance.choice(folders) / f"l{number}"
        target = chance.choice(folders)
        link.symlink_to(target if chance.random() < 0.5 else os.path.relpath(target, link.parent.resolve()))
    names = ["a", "b", "c", "l0", "l1", "l2", "..", ".", "new", "newer"]
    checked = 0
    while checked < pairs:
        one, other = (root.joinpath(*chance.choices(names, k=chance.randint(1, 5))) for _ in range(2))
        found = is_refused(place_of(one, replaced=True), place_of(other))
        closed = is_refused(place_of(other, written=True), place_of(one, closed=True))
        read = is_refused(place_of(other), place_of(one, closed=True, written=True))
        before = {str(path) for path in root.rglob("*")}
        try:
            one.mkdir(parents=True, exist_ok=True)
            other.mkdir(parents=True, exist_ok=True)
        except OSError:  # a step up from what is not there: the disk knows of no such path
            continue
        ways = on_the_way_up(one), on_the_way_up(other)
        overlaps = ways[0][0] in ways[1]
        assert (found, closed, read) == (overlaps, overlaps, False), (seed, one, other)
        checked += 1
        for path in sorted((p for p in root.rglob("*") if str(p) not in before), reverse=True):
            path.rmdir()


@pytest.mark.parametrize(
    "seeds", [range(60), pytest.param(range(60, 1060), marks=pytest.mark.slow)], ids=["some", "many"]
)
def test_paths_overlap_if_and_only_if_they_do_on_the_disk(tmp_path, seeds):
    for seed in seeds:
        (tmp_path / str(seed)).mkdir()
        check_pairs(seed, tmp_path / str(seed))


@pytest.fixture
def recipe(tmp_path):
    for name in ("questions", "samples"):
        (tmp_path / name).mkdir()
    components = {"language": {"method": "bivlm", "groups": 2, "p_max": 0.05}}
    return parse_recipe(
        {
            "name": "r",
            "format": 1,
            "components": components,
            "evaluation": [f"vqa:{tmp_path}/questions"],
            "calibration": {"source": f"{tmp_path}/samples"},
        }
    )


def check(tmp_path, recipe, output="out", workspace="workspace", model="model"):
    check_places([output_place(tmp_path / output)], [str(tmp_path / model)], str(tmp_path / workspace), recipe.data())


REFUSED = {
    "the workspace in the output": {"workspace": "out/ws"},
    "the workspace is the output": {"workspace": "out"},
    "the output in the workspace": {"output": "workspace/out"},
    "the workspace in the model": {"workspace": "model/ws"},
    "the workspace is the model": {"workspace": "model"},
    "the output in the model": {"output": "model/out"},
    "the model in the output": {"output": "."},
    "the questions are the output": {"output": "questions"},
    "the samples are the output": {"output": "samples"},
    "by way of a link": {"output": "link/workspace/out"},
    "by way of a link that is not there yet": {"workspace": "later/ws"},
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_be_destroyed_is_refused_before_anything_is_made(tmp_path, recipe, case):
    (tmp_path / "model").mkdir()
    (tmp_path / "link").symlink_to(tmp_path)
    (tmp_path / "later").symlink_to(tmp_path / "out")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match="overlaps the"):
        check(tmp_path, recipe, **REFUSED[case])
    assert sorted(tmp_path.rglob("*")) == before


USUAL = {
    "side by side": {},
    "the output beside the questions": {"output": "questions/out"},
    "the workspace above the model": {"workspace": "."},
    "a model in the workspace": {"model": "workspace/model"},
    "names that begin alike": {"output": "model-out", "workspace": "model-out-ws"},
}


@pytest.mark.parametrize("case", USUAL)
def test_what_lies_in_one_another_without_harm_is_allowed(tmp_path, recipe, case):
    (tmp_path / "model").mkdir()
    (tmp_path / "workspace" / "model").mkdir(parents=True)
    if case == "the workspace above the model":
        with pytest.raises(InputError, match="overlaps the workspace"):  # the output would lie in it, too
            check(tmp_path, recipe, **USUAL[case])
        check_places([], [str(tmp_path / "model")], str(tmp_path), recipe.data())
    else:
        check(tmp_path, recipe, **USUAL[case])


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("BIVLM_CACHE", "out/cache"),
        ("HF_HOME", "out/hf"),
        ("PREFECT_HOME", "out/prefect"),
        ("MLFLOW_TRACKING_URI", "sqlite:///{place}/out/mlflow.db"),
    ],
)
def test_what_every_run_uses_may_not_lie_in_an_output(tmp_path, recipe, monkeypatch, variable, value):
    check(tmp_path, recipe)
    monkeypatch.setenv(variable, value.format(place=tmp_path) if "{" in value else str(tmp_path / value))
    with pytest.raises(InputError, match="overlaps the"):
        check(tmp_path, recipe)


def test_an_output_may_not_be_where_one_stands_nor_hold_temporary_files(tmp_path, recipe, monkeypatch):
    (tmp_path / "here" / "below").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here" / "below")
    for output in ("here", "here/below"):
        with pytest.raises(InputError, match="overlaps the current folder"):
            check(tmp_path, recipe, output=output)
    check(tmp_path, recipe, output="here/below/out")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "out" / "tmp"))
    with pytest.raises(InputError, match="overlaps the folder for temporary files"):
        check(tmp_path, recipe)


def test_a_loop_of_links_is_named(tmp_path, recipe):
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(InputError, match=r"workspace .*loop.*: not a path that leads anywhere"):
        check(tmp_path, recipe, workspace="loop")
