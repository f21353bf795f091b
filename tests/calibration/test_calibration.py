"""Calibration samples are frozen once, hashed by content, and read back as they were; held-out ones stay apart."""

import json
from pathlib import Path

import pytest
from PIL import Image

from bivlm.calibration.frozen import freeze_samples, load_held_out, load_samples, open_calibration
from bivlm.errors import InputError
from bivlm.recipe.calibration import CalibrationSettings, held_out_samples
from bivlm.reference.question_sets import calibration_samples


@pytest.fixture
def source(tmp_path) -> Path:
    """Six conversations about six images."""
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


def settings(source="reference", samples=2, held_out=1, **others):
    return CalibrationSettings(source=str(source), samples=samples, held_out=held_out, **others)


def _texts(conversations):
    return [(c.user, c.assistant, c.image.size, c.image.tobytes()) for c in conversations]


def test_reference_samples_come_back_as_they_were_drawn(tmp_path):
    frozen = freeze_samples(settings(samples=7, held_out=3, seed=3), tmp_path / "frozen")
    assert _texts(load_samples(frozen.folder) + load_held_out(frozen.folder)) == _texts(calibration_samples(10, 3))
    assert (frozen.samples, frozen.held_out, frozen.text_only, frozen.skipped) == (7, 3, 0, 0)
    assert frozen == open_calibration(frozen.folder)


def test_sixty_four_samples_and_as_many_held_out_unless_the_recipe_says_more():
    assert (CalibrationSettings().samples, CalibrationSettings().held_out) == (64, 64)


def test_the_same_settings_freeze_the_same_bytes_and_others_do_not(tmp_path):
    first, again, other = (
        freeze_samples(settings(samples=4, seed=seed), tmp_path / name)
        for name, seed in (("first", 0), ("again", 0), ("other", 1))
    )
    assert first.sha256 == again.sha256 != other.sha256
    files = [{path.name: path.read_bytes() for path in s.folder.iterdir()} for s in (first, again)]
    assert files[0] == files[1]
    assert sum(name.endswith(".png") for name in files[0]) == 5


def test_the_hash_is_over_what_the_samples_are_not_how_the_images_are_stored(source, tmp_path):
    first = freeze_samples(settings(source, 4, 2), tmp_path / "first")
    for path in source.glob("*.png"):
        Image.open(path).save(path, compress_level=0)
    again = freeze_samples(settings(source, 4, 2), tmp_path / "again")
    assert first.sha256 == again.sha256


@pytest.mark.parametrize("held_out", [False, True])
def test_the_hash_follows_every_image_held_out_or_not(source, tmp_path, held_out):
    first = freeze_samples(settings(source, 4, 2), tmp_path / "first")
    part = load_held_out(first.folder) if held_out else load_samples(first.folder)
    Image.new("RGB", (8, 6), "white").save(source / f"{part[0].user[-2]}.png")
    assert freeze_samples(settings(source, 4, 2), tmp_path / "changed").sha256 != first.sha256


def test_the_hash_follows_how_the_same_conversations_are_divided(source, tmp_path):
    first, other = (freeze_samples(settings(source, n, 6 - n), tmp_path / str(n)) for n in (3, 4))
    assert first.sha256 != other.sha256


def test_a_folder_is_sampled_by_seed(source, tmp_path):
    drawn = {
        seed: [
            c.user for c in load_samples(freeze_samples(settings(source, 3, seed=seed), tmp_path / str(seed)).folder)
        ]
        for seed in range(8)
    }
    assert all(len(set(users)) == 3 for users in drawn.values())
    assert len({tuple(users) for users in drawn.values()}) > 1


def test_more_held_out_samples_leave_the_calibration_samples_as_they_are(source, tmp_path):
    few, many = (freeze_samples(settings(source, 3, n), tmp_path / str(n)).folder for n in (1, 3))
    assert _texts(load_samples(few)) == _texts(load_samples(many))
    assert _texts(load_held_out(few)) == _texts(load_held_out(many))[:1]


@pytest.mark.parametrize("seed", range(4))
def test_held_out_samples_are_others(source, tmp_path, seed):
    folder = freeze_samples(settings(source, 3, 3, seed=seed), tmp_path / "frozen").folder
    users = [c.user for c in load_samples(folder) + load_held_out(folder)]
    assert sorted(users) == [f"Question {index}?" for index in range(6)]


def test_held_out_samples_share_no_image_with_calibration(source, tmp_path):
    lines = (source / "data.jsonl").read_text().splitlines()
    more = [json.dumps(json.loads(line) | {"user": "Another?"}) for line in lines]
    (source / "data.jsonl").write_text("\n".join(lines + more))
    folder = freeze_samples(settings(source, 3, 3), tmp_path / "frozen").folder
    calibrated, held_out = ({c.image.tobytes() for c in part} for part in (load_samples(folder), load_held_out(folder)))
    assert not calibrated & held_out
    with pytest.raises(InputError, match=r"at most the \d+ of .*data\.jsonl, beside \d+ that share image or text"):
        freeze_samples(settings(source, 6, 6), tmp_path / "too many")


def test_a_folder_that_is_too_small_is_refused_with_the_numbers(source, tmp_path):
    expected = (
        r"calibration.samples: found 5, and calibration.held_out 2, which takes 7 samples with an image; "
        r"expected at most the 6 of .*data\.jsonl"
    )
    with pytest.raises(InputError, match=expected):
        freeze_samples(settings(source, 5, 2), tmp_path / "frozen")
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
        freeze_samples(settings(source, 1), tmp_path / "frozen")


def test_an_unknown_source_is_refused(tmp_path):
    with pytest.raises(InputError, match="nowhere: no such folder"):
        freeze_samples(settings(tmp_path / "nowhere"), tmp_path / "frozen")


def test_a_folder_that_holds_something_is_not_overwritten(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="expected a new or empty folder"):
        freeze_samples(settings(samples=1), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "empty").mkdir()
    frozen = freeze_samples(settings(samples=1), tmp_path / "empty")
    assert len(load_samples(frozen.folder)) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_your_own_folder_with_a_damaged_image_is_an_error_and_leaves_nothing(source, tmp_path):
    Image.effect_noise((64, 64), 50).save(source / "5.png")
    (source / "5.png").write_bytes((source / "5.png").read_bytes()[:900])
    with pytest.raises(InputError, match=r"5\.png"):
        freeze_samples(settings(source, 5, 1), tmp_path / "out" / "frozen")
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(("name", "load"), [("00001.png", load_samples), ("held-00000.png", load_held_out)])
def test_an_image_changed_after_freezing_is_noticed(tmp_path, name, load):
    frozen = freeze_samples(settings(), tmp_path / "frozen")
    Image.new("RGB", (128, 128)).save(frozen.folder / name)
    with pytest.raises(InputError, match=rf"key 'image': found '{name}'.*changed since"):
        load(frozen.folder)


def test_a_folder_frozen_without_held_out_samples_is_no_calibration_set(tmp_path):
    frozen = freeze_samples(settings(), tmp_path / "frozen")
    (frozen.folder / "held_out.jsonl").unlink()
    with pytest.raises(InputError, match=r"held_out\.jsonl: no such file"):
        open_calibration(frozen.folder)


@pytest.mark.parametrize(
    ("given", "said"),
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
def test_the_samples_that_the_divergence_is_measured_on_have_a_name(given, said):
    assert held_out_samples(CalibrationSettings(**given).model_dump(mode="json")) == said
