"""Calibration samples are frozen once, hashed by content, and read back as they were; held-out ones stay apart."""

import json
from pathlib import Path

import pytest
from freezing import freeze, parts, said, shown
from PIL import Image

from bivlm.calibration.frozen import load_held_out, load_samples, open_calibration
from bivlm.errors import InputError
from bivlm.recipe.calibration import CalibrationSettings, held_out_samples
from bivlm.reference.question_sets import calibration_samples


@pytest.fixture
def source(tmp_path) -> Path:
    """Six samples about six images."""
    folder = tmp_path / "source"
    folder.mkdir()
    lines = []
    for index in range(6):
        Image.new("RGB", (8, 6), (40 * index, 0, 0)).save(folder / f"{index}.png")
        lines.append({"image": f"{index}.png", "user": f"Question {index}?", "assistant": f"Answer {index}"})
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def _whole(samples):
    return [(s.user, s.assistant, s.image.size, s.image.tobytes()) for s in samples]


def test_reference_samples_come_back_as_they_were_drawn(tmp_path):
    frozen = freeze(tmp_path, samples=7, held_out=3, seed=3)
    assert _whole(parts(frozen)[0] + parts(frozen)[1]) == _whole(calibration_samples(10, 3))
    assert (frozen.samples, frozen.held_out, frozen.text_only, frozen.skipped) == (7, 3, 0, 0)
    assert frozen == open_calibration(frozen.folder)


def test_sixty_four_samples_and_as_many_held_out_unless_the_recipe_says_more():
    assert (CalibrationSettings().samples, CalibrationSettings().held_out) == (64, 64)


def test_the_same_settings_freeze_the_same_bytes_and_others_do_not(tmp_path):
    first, again, other = (freeze(tmp_path, samples=4, held_out=1, name=n, seed=int(n == "c")) for n in "abc")
    assert first.sha256 == again.sha256 != other.sha256
    files = [{path.name: path.read_bytes() for path in s.folder.iterdir()} for s in (first, again)]
    assert files[0] == files[1]
    assert sum(name.endswith(".png") for name in files[0]) == 5


def test_the_hash_is_over_what_the_samples_are_not_how_the_images_are_stored(source, tmp_path):
    first = freeze(tmp_path, source, 4, 2, "first")
    for path in source.glob("*.png"):
        Image.open(path).save(path, compress_level=0)
    assert freeze(tmp_path, source, 4, 2, "again").sha256 == first.sha256


@pytest.mark.parametrize("part", [0, 1])
def test_the_hash_follows_every_image_held_out_or_not(source, tmp_path, part):
    first = freeze(tmp_path, source, 4, 2, "first")
    Image.new("RGB", (8, 6), "white").save(source / f"{parts(first)[part][0].user[-2]}.png")
    assert freeze(tmp_path, source, 4, 2, "changed").sha256 != first.sha256


def test_the_hash_follows_how_the_same_samples_are_divided(source, tmp_path):
    first, other = (freeze(tmp_path, source, n, 6 - n, str(n)) for n in (3, 4))
    assert first.sha256 != other.sha256


def test_a_folder_is_sampled_by_seed(source, tmp_path):
    drawn = [[s.user for s in parts(freeze(tmp_path, source, 3, 1, str(seed), seed=seed))[0]] for seed in range(8)]
    assert all(len(set(users)) == 3 for users in drawn)
    assert len(set(map(tuple, drawn))) > 1


def test_more_held_out_samples_leave_the_calibration_samples_as_they_are(source, tmp_path):
    (samples, few), (same, many) = (parts(freeze(tmp_path, source, 3, n, str(n))) for n in (1, 3))
    assert _whole(samples) == _whole(same)
    assert _whole(few) == _whole(many)[:1]


def test_more_samples_than_come_before_the_held_out_ones_leave_these_as_they_are(source, tmp_path, monkeypatch):
    """So recipes with more samples are measured on the same; what is drawn later shares no image with them either."""
    monkeypatch.setattr("bivlm.calibration.drawing.FIRST_SAMPLES", 2)
    few, more = (freeze(tmp_path, source, n, 2, str(n)) for n in (2, 4))
    assert _whole(parts(few)[1]) == _whole(parts(more)[1])
    assert _whole(parts(few)[0]) == _whole(parts(more)[0])[:2]
    assert sorted(user for user, _ in said(more)) == [f"Question {index}?" for index in range(6)]
    lines = (source / "data.jsonl").read_text().splitlines()
    again = [json.dumps(json.loads(line) | {"user": "Another?"}) for line in lines]
    (source / "data.jsonl").write_text("\n".join(lines + again))
    for seed in range(4):
        calibrated, held_out = shown(freeze(tmp_path, source, 4, 2, f"shared {seed}", seed=seed))
        assert not calibrated & held_out


@pytest.mark.parametrize("seed", range(4))
def test_held_out_samples_are_others(source, tmp_path, seed):
    users = [user for user, _ in said(freeze(tmp_path, source, 3, 3, seed=seed))]
    assert sorted(users) == [f"Question {index}?" for index in range(6)]


def test_held_out_samples_share_no_image_with_calibration(source, tmp_path):
    lines = (source / "data.jsonl").read_text().splitlines()
    more = [json.dumps(json.loads(line) | {"user": "Another?"}) for line in lines]
    (source / "data.jsonl").write_text("\n".join(lines + more))
    calibrated, held_out = shown(freeze(tmp_path, source, 3, 3))
    assert not calibrated & held_out
    with pytest.raises(InputError, match=r"at most the \d+ of .*data\.jsonl, beside \d+ that share image or text"):
        freeze(tmp_path, source, 6, 6, "too many")


def test_a_folder_that_is_too_small_is_refused_with_the_numbers(source, tmp_path):
    expected = (
        r"calibration.samples: found 5, and calibration.held_out 2, which takes 7 samples with an image; "
        r"expected at most the 6 of .*data\.jsonl"
    )
    with pytest.raises(InputError, match=expected):
        freeze(tmp_path, source, 5, 2)
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
        freeze(tmp_path, source, 1, 1)


def test_an_unknown_source_is_refused(tmp_path):
    with pytest.raises(InputError, match="nowhere: no such folder"):
        freeze(tmp_path, tmp_path / "nowhere")


def test_an_empty_folder_is_filled_and_one_that_holds_something_is_not_overwritten(tmp_path):
    (tmp_path / "frozen").mkdir()
    assert len(parts(freeze(tmp_path, samples=1, held_out=1))[0]) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["frozen"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="expected a new or empty folder"):
        freeze(tmp_path, name="other")
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["mine.txt"]


def test_your_own_folder_with_a_damaged_image_is_an_error_and_leaves_nothing(source, tmp_path):
    Image.effect_noise((64, 64), 50).save(source / "5.png")
    (source / "5.png").write_bytes((source / "5.png").read_bytes()[:900])
    with pytest.raises(InputError, match=r"5\.png"):
        freeze(tmp_path / "out", source, 5, 1)
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(("name", "load"), [("00001.png", load_samples), ("held-00000.png", load_held_out)])
def test_an_image_changed_after_freezing_is_noticed(tmp_path, name, load):
    folder = freeze(tmp_path, samples=2, held_out=1).folder
    Image.new("RGB", (128, 128)).save(folder / name)
    with pytest.raises(InputError, match=rf"key 'image': found '{name}'.*changed since"):
        load(folder)


def test_a_folder_frozen_without_held_out_samples_is_no_calibration_set(tmp_path):
    folder = freeze(tmp_path, samples=2, held_out=1).folder
    (folder / "held_out.jsonl").unlink()
    with pytest.raises(InputError, match=r"held_out\.jsonl: no such file"):
        open_calibration(folder)


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ({}, "64 held-out samples of the reference scenes"),
        ({"source": "/data/mine", "held_out": 5}, "5 held-out samples of /data/mine"),
        (
            {"source": "hf:owner/name", "text_share": 0.5, "text_source": "talk.jsonl"},
            "64 held-out samples of hf:owner/name and texts of talk.jsonl",
        ),
        (
            {"text_share": 0.5, "text_source": "reference"},
            "64 held-out samples of the reference scenes and texts of the reference generator",
        ),
    ],
)
def test_the_samples_that_the_divergence_is_measured_on_have_a_name(given, name):
    assert held_out_samples(CalibrationSettings(**given).model_dump(mode="json")) == name
