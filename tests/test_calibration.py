"""Calibration samples are frozen once, hashed by content, and read back as they were."""

import json
from pathlib import Path

import pytest
from PIL import Image

from bivlm.calibration import freeze_samples, load_samples, open_calibration
from bivlm.errors import InputError
from bivlm.recipe import CalibrationSettings
from bivlm.reference import calibration_samples


@pytest.fixture
def source(tmp_path) -> Path:
    """Six conversations about six pictures."""
    folder = tmp_path / "source"
    folder.mkdir()
    lines = []
    for index in range(6):
        Image.new("RGB", (8, 6), (40 * index, 0, 0)).save(folder / f"{index}.png")
        lines.append(
            json.dumps({"image": f"{index}.png", "user": f"Question {index}?", "assistant": f"Answer {index}"})
        )
    (folder / "data.jsonl").write_text("\n".join(lines))
    return folder


def _texts(conversations):
    return [(c.user, c.assistant, c.image.size, c.image.tobytes()) for c in conversations]


def test_reference_samples_come_back_as_they_were_drawn(tmp_path):
    frozen = freeze_samples(CalibrationSettings(samples=7, seed=3), tmp_path / "frozen")
    assert _texts(load_samples(frozen.folder)) == _texts(calibration_samples(7, 3))
    assert frozen == open_calibration(frozen.folder)


def test_the_same_settings_freeze_the_same_bytes_and_others_do_not(tmp_path):
    first, again, other = (
        freeze_samples(CalibrationSettings(samples=4, seed=seed), tmp_path / name)
        for name, seed in (("first", 0), ("again", 0), ("other", 1))
    )
    assert first.sha256 == again.sha256 != other.sha256
    files = [{path.name: path.read_bytes() for path in s.folder.iterdir()} for s in (first, again)]
    assert files[0] == files[1]
    assert len(files[0]) == 5


def test_the_hash_is_over_what_the_samples_are_not_how_the_pictures_are_stored(source, tmp_path):
    first = freeze_samples(CalibrationSettings(source=str(source), samples=6), tmp_path / "first")
    for path in source.glob("*.png"):
        Image.open(path).save(path, compress_level=0)
    again = freeze_samples(CalibrationSettings(source=str(source), samples=6), tmp_path / "again")
    assert first.sha256 == again.sha256
    Image.new("RGB", (8, 6), "white").save(source / "3.png")
    changed = freeze_samples(CalibrationSettings(source=str(source), samples=6), tmp_path / "changed")
    assert changed.sha256 != first.sha256


def test_a_folder_is_sampled_by_seed_in_its_order(source, tmp_path):
    drawn = {
        seed: [c.user for c in load_samples(freeze_samples(settings, tmp_path / str(seed)).folder)]
        for seed in range(8)
        for settings in [CalibrationSettings(source=str(source), samples=3, seed=seed)]
    }
    assert all(users == sorted(set(users)) and len(users) == 3 for users in drawn.values())
    assert len({tuple(users) for users in drawn.values()}) > 1


def test_a_folder_that_is_too_small_is_refused(source, tmp_path):
    with pytest.raises(InputError, match=r"calibration.samples: found 7, expected at most the 6 of .*data\.jsonl"):
        freeze_samples(CalibrationSettings(source=str(source), samples=7), tmp_path / "frozen")
    assert not (tmp_path / "frozen").exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"image": "0.png", "user": "?"}, "key 'assistant' is missing"),
        ({"image": "0.png", "user": "?", "assistant": ""}, "key 'assistant': found ''"),
        ({"image": "../0.png", "user": "?", "assistant": "x"}, "key 'image': .*not outside"),
        ({"image": "0.png", "user": "?", "assistant": "x", "answers": []}, "key 'answers'"),
    ],
)
def test_a_malformed_line_is_named_even_if_it_would_not_be_drawn(source, tmp_path, line, message):
    with (source / "data.jsonl").open("a") as file:
        file.write("\n" + json.dumps(line))
    with pytest.raises(InputError, match=rf"data\.jsonl, line 7.*{message}"):
        freeze_samples(CalibrationSettings(source=str(source), samples=1), tmp_path / "frozen")


def test_an_unknown_source_is_refused(tmp_path):
    with pytest.raises(InputError, match="nowhere: no such folder"):
        freeze_samples(CalibrationSettings(source=str(tmp_path / "nowhere")), tmp_path / "frozen")


def test_a_folder_that_holds_something_is_not_overwritten(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="expected a new or empty folder"):
        freeze_samples(CalibrationSettings(samples=1), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "empty").mkdir()
    frozen = freeze_samples(CalibrationSettings(samples=1), tmp_path / "empty")
    assert len(load_samples(frozen.folder)) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_a_source_that_fails_half_way_leaves_nothing(source, tmp_path):
    Image.effect_noise((64, 64), 50).save(source / "5.png")
    (source / "5.png").write_bytes((source / "5.png").read_bytes()[:900])
    with pytest.raises(InputError, match=r"5\.png"):
        freeze_samples(CalibrationSettings(source=str(source), samples=6), tmp_path / "out" / "frozen")
    assert not list((tmp_path / "out").iterdir())


def test_a_picture_changed_after_freezing_is_noticed(tmp_path):
    frozen = freeze_samples(CalibrationSettings(samples=2), tmp_path / "frozen")
    Image.new("RGB", (128, 128)).save(frozen.folder / "00001.png")
    with pytest.raises(InputError, match=r"line 2, key 'image': .*changed since"):
        load_samples(frozen.folder)
