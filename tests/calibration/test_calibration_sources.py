"""Conversations as others publish them, text without images mixed in by share, and what cannot be used replaced."""

import json
import re
import warnings
from pathlib import Path

import pytest
import yaml
from freezing import freeze, parts, said
from PIL import Image

from bivlm.calibration.frozen import freeze_samples
from bivlm.errors import InputError
from bivlm.recipe.calibration import CalibrationSettings

ENTRIES = 12


def turns(index):
    return [
        {"from": "human", "value": f"<image>\nQuestion {index}?"},
        {"from": "gpt", "value": f"Answer {index}"},
        {"from": "human", "value": "And then?"},
        {"from": "gpt", "value": "Nothing"},
    ]


@pytest.fixture
def llava(tmp_path) -> Path:
    """Twelve entries in the form of LLaVA-Instruct, with their images in folders beside the file."""
    folder = tmp_path / "llava"
    (folder / "coco" / "train").mkdir(parents=True)
    entries = []
    for index in range(ENTRIES):
        Image.effect_noise((32, 24), 40 + index).convert("RGB").save(folder / "coco" / "train" / f"{index}.png")
        entries.append({"id": str(index), "image": f"coco/train/{index}.png", "conversations": turns(index)})
    return write(folder / "instruct.json", entries)


@pytest.fixture
def texts(tmp_path) -> Path:
    """Twenty conversations without images."""
    lines = [{"user": f"Text {index}?", "assistant": f"Reply {index}"} for index in range(20)]
    return write(tmp_path / "texts.jsonl", lines)


def write(path, entries):
    if path.suffix == ".json":
        path.write_text(json.dumps(entries))
    else:
        path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


def changed(path, changes):
    """The file with some entries updated, by their place."""
    entries = json.loads(path.read_text())
    for place, change in changes.items():
        entries[place].update(change)
    return write(path, entries)


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_the_first_exchange_of_a_conversation_is_taken_without_its_placeholder(llava, tmp_path, suffix):
    file = write(llava.with_suffix(suffix), json.loads(llava.read_text()))
    frozen = freeze(tmp_path, file, samples=10)
    assert sorted(said(frozen)) == sorted((f"Question {i}?", f"Answer {i}") for i in range(ENTRIES))
    first = parts(frozen)[0][0]
    assert first.image.tobytes() == Image.open(llava.parent / "coco" / "train" / f"{first.user[9:-1]}.png").tobytes()


@pytest.mark.parametrize(
    "first",
    [
        [{"from": "system", "value": "Be kind."}, *turns(0)],
        [{"from": "gpt", "value": "Hello"}, *turns(0)],
        [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Question 0?"}]},
            {"role": "assistant", "content": "Answer 0"},
        ],
        [{"user": "Question 0?", "assistant": "Answer 0", "source": "somewhere"}],
        {"from": ["human", "gpt"], "value": ["Question 0?", "Answer 0"]},
    ],
)
def test_other_spellings_of_the_same_exchange(llava, tmp_path, first):
    frozen = freeze(tmp_path, changed(llava, {0: {"conversations": first}}), samples=10)
    assert ("Question 0?", "Answer 0") in said(frozen)


def test_images_may_lie_in_a_folder_of_their_own(llava, tmp_path):
    elsewhere = write(tmp_path / "elsewhere.json", json.loads(llava.read_text()))
    frozen = freeze(tmp_path, elsewhere, images=str(llava.parent))
    assert said(frozen) == said(freeze(tmp_path, llava, name="beside"))
    with pytest.raises(InputError, match=r"calibration.images: found '.*nowhere', expected a folder"):
        freeze(tmp_path, elsewhere, images=str(tmp_path / "nowhere"), name="none")


def test_a_strict_file_may_have_any_name(llava, tmp_path):
    line = {"image": "train/0.png", "user": "What?", "assistant": "That"}
    other = {"image": "train/1.png", "user": "What?", "assistant": "This"}
    frozen = freeze(tmp_path, write(llava.parent / "coco" / "mine.jsonl", [line, other]), samples=1, held_out=1)
    assert sorted(said(frozen)) == [("What?", "That"), ("What?", "This")]


UNUSABLE = {
    "missing": ({"image": "coco/train/none.png"}, "no such file"),
    "outside": ({"image": "../../secret.png"}, "not outside"),
    "several": ({"image": ["coco/train/0.png", "coco/train/1.png"]}, r"key 'image': found \[.*expected one image"),
    "none": ({"image": None}, "key 'image': found None, expected one image"),
    "unanswered": (
        {"conversations": turns(0)[:1]},
        "key 'conversations': found .*expected a user turn that is answered",
    ),
    "two placeholders": (
        {"conversations": [{"from": "human", "value": "<image> <image> Same?"}, {"from": "gpt", "value": "No"}]},
        "found '<image> <image> Same.', expected at most 1 <image>, and not 2",
    ),
    "no text": (
        {"conversations": [{"from": "human", "value": "<image>\n"}, {"from": "gpt", "value": "x"}]},
        "found ''",
    ),
    "no turns": ({"conversations": 7}, "key 'conversations': found 7, expected a list of turns"),
    "other turns": (
        {"conversations": [{"speaker": "human"}]},
        "found {'speaker': 'human'}, expected turns with 'from'",
    ),
}


@pytest.mark.parametrize("kind", UNUSABLE)
def test_an_entry_that_cannot_be_used_is_replaced_counted_and_warned_of(llava, tmp_path, kind):
    change, reason = UNUSABLE[kind]
    changed(llava, {4: change})
    with pytest.warns(UserWarning, match=rf"1 of 12 samples drawn .*instruct\.json, sample 5, .*{reason}"):
        frozen = freeze(tmp_path, llava, samples=9, held_out=2)
    assert frozen.skipped == 1
    assert sorted(said(frozen)) == sorted((f"Question {i}?", f"Answer {i}") for i in range(ENTRIES) if i != 4)


def test_an_image_that_cannot_be_decoded_is_replaced(llava, tmp_path):
    damaged = llava.parent / "coco" / "train" / "7.png"
    damaged.write_bytes(damaged.read_bytes()[:300])
    with pytest.warns(UserWarning, match=r"7\.png: expected an image .* cannot decode it"):
        frozen = freeze(tmp_path, llava, samples=9, held_out=2)
    assert (frozen.skipped, frozen.samples, frozen.held_out) == (1, 9, 2)


def test_without_anything_skipped_there_is_no_warning(llava, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert freeze(tmp_path, llava).skipped == 0


@pytest.mark.parametrize(("samples", "held_out"), [(2, 1), (6, 2)])
def test_more_than_half_unusable_is_refused_with_the_count_and_the_first(llava, tmp_path, samples, held_out):
    changed(llava, {index: {"image": f"gone/{index}.png"} for index in range(9)})
    with pytest.raises(
        InputError, match=r"more than half, \d+ of \d+ samples .* the first: .*sample \d+, key 'image': .*'gone/\d"
    ):
        freeze(tmp_path, llava, samples=samples, held_out=held_out, seed=4)
    assert not (tmp_path / "frozen").exists()


def test_too_few_usable_entries_are_told_with_what_was_lost(llava, tmp_path):
    changed(llava, {4: {"image": "gone.png"}})
    with pytest.raises(
        InputError, match=r"takes 12 .*at most the 11 of .*, beside 1 that cannot be used \(.*gone\.png"
    ):
        freeze(tmp_path, llava, samples=10)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "found {}, expected a list of samples"),
        ("[]", r"found \[\], expected a list"),
        ("[1]", "sample 1: found 1, expected a JSON object"),
        ("[{", "not valid JSON"),
    ],
)
def test_a_file_that_holds_no_conversations_is_refused(tmp_path, content, message):
    (tmp_path / "bad.json").write_text(content)
    with pytest.raises(InputError, match=rf"bad\.json.*{message}"):
        freeze(tmp_path, tmp_path / "bad.json")


@pytest.mark.parametrize(("share", "of_six", "of_two"), [(0.25, 2, 1), (0.5, 3, 1), (0.01, 0, 0), (0.99, 5, 1)])
def test_the_share_of_text_is_exact_in_both_parts(llava, texts, tmp_path, share, of_six, of_two):
    frozen = freeze(tmp_path, llava, text_share=share, text_source=str(texts))
    assert [sum(c.image is None for c in part) for part in parts(frozen)] == [of_six, of_two]
    assert frozen.text_only == of_six
    assert all(c.user.startswith("Text") == (c.image is None) for part in parts(frozen) for c in part)


def test_text_is_spread_evenly_and_never_repeated(llava, texts, tmp_path):
    frozen = freeze(tmp_path, llava, samples=8, held_out=4, text_share=0.5, text_source=str(texts))
    assert [c.image is None for c in parts(frozen)[0]] == [False, True] * 4
    spoken = [user for user, _ in said(frozen)]
    assert len(set(spoken)) == len(spoken)


def test_a_held_out_text_is_none_that_calibration_saw(llava, tmp_path):
    repeated = [{"user": "Text?", "assistant": "Reply"}] * 9
    texts = write(tmp_path / "repeated.jsonl", repeated)
    with pytest.raises(InputError, match=r"takes 6 samples without an image; .*beside 6 that share image or text"):
        freeze(tmp_path, llava, samples=6, held_out=6, text_share=0.5, text_source=str(texts))


def test_the_text_is_drawn_by_seed_and_the_hash_follows_it(llava, texts, tmp_path):
    def sha256(name, seed=0):
        return freeze(tmp_path, llava, name=name, text_share=0.5, text_source=str(texts), seed=seed).sha256

    first = sha256("first")
    assert first == sha256("again") != sha256("other", 1)
    texts.write_text(texts.read_text().replace("Reply", "Answer"))
    assert sha256("then") != first


def test_too_little_text_is_refused_with_the_numbers(llava, texts, tmp_path):
    write(texts, [{"user": "Only this?", "assistant": "Yes"}])
    with pytest.raises(InputError, match=r"takes 4 samples without an image; expected at most the 1 of .*texts"):
        freeze(tmp_path, llava, text_share=0.5, text_source=str(texts))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"user": "?"}, "line 21: key 'assistant' is missing"),
        ({"user": "?", "assistant": "!", "image": "0.png"}, "line 21, key 'image': .*one of the keys user, assistant"),
    ],
)
def test_a_malformed_line_of_text_is_named(llava, texts, tmp_path, line, message):
    with texts.open("a") as file:
        file.write(json.dumps(line))
    with pytest.raises(InputError, match=message):
        freeze(tmp_path, llava, text_share=0.5, text_source=str(texts))


def test_conversations_without_images_may_be_in_the_published_form(llava, tmp_path):
    entries = [
        {"conversations": [{"from": "human", "value": f"Text {i}?"}, {"from": "gpt", "value": "!"}]} for i in range(8)
    ]
    entries[3] = json.loads(llava.read_text())[0]
    texts = write(tmp_path / "sharegpt.json", entries)
    with pytest.warns(UserWarning, match=r"sample 4, key 'image': found 'coco.*expected no image"):
        frozen = freeze(tmp_path, llava, samples=6, held_out=8, text_share=0.5, text_source=str(texts))
    assert frozen.skipped == 1


def test_a_text_file_that_is_not_there_is_refused(llava, tmp_path):
    with pytest.raises(InputError, match=r"calibration.text_source: found '.*none\.jsonl', expected a file"):
        freeze(tmp_path, llava, text_share=0.5, text_source=str(tmp_path / "none.jsonl"))


def test_reference_text_is_of_the_catalogue(tmp_path):
    frozen = freeze(tmp_path, "reference", samples=20, held_out=20, text_share=0.5, text_source="reference")
    text = [c for part in parts(frozen) for c in part if c.image is None]
    assert len({(c.user, c.assistant) for c in text}) == 20
    assert {c.user.split()[0] for c in text} <= {"Describe", "Where", "What"}


def test_the_page_on_calibration_shows_what_works(tmp_path, monkeypatch):
    page = (Path(__file__).parents[2] / "docs" / "calibration.md").read_text()
    recipes = [yaml.safe_load(part)["calibration"] for part in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)]
    for recipe in recipes:
        CalibrationSettings.model_validate(recipe)
    (lines,) = re.findall(r"```jsonl\n(.*?)```", page, re.DOTALL)
    (tmp_path / "drive" / "frames").mkdir(parents=True)
    (tmp_path / "drive" / "data.jsonl").write_text(lines)
    for shade, line in enumerate(lines.splitlines()):
        Image.new("RGB", (64, 36), (shade, 0, 0)).save(tmp_path / "drive" / json.loads(line)["image"], quality=100)
    monkeypatch.chdir(tmp_path)
    frozen = freeze_samples(CalibrationSettings.model_validate(recipes[-1]), tmp_path / "frozen")
    assert (frozen.samples, frozen.held_out) == (3, 1)
