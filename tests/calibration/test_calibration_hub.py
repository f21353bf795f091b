"""Data sets as the hub has them (folders of parquet files are read by the same code), and a hub that has none."""

import io
from pathlib import Path

import datasets
import huggingface_hub
import pytest
from datasets import Dataset, Features, List, Value
from freezing import freeze, parts, said, shown
from hub_server import hub  # noqa: F401  a fixture
from PIL import Image

from bivlm.calibration.frozen import open_calibration
from bivlm.calibration.sources import open_hub_images, open_hub_texts
from bivlm.errors import InputError
from bivlm.recipe.calibration import CalibrationSettings

ROWS = 20
COMMIT = "c0ffee" * 6 + "c0ff"
TURNS = List({"from": Value("string"), "value": Value("string")})


def png(index):
    stream = io.BytesIO()
    image = Image.linear_gradient("L").resize((24, 16)).convert("RGB")
    image.putpixel((0, 0), (index, 200, 0))
    image.save(stream, "PNG")
    return stream.getvalue()


def conversation(index, place="<image>\n"):
    return [{"from": "human", "value": f"{place}Question {index}?"}, {"from": "gpt", "value": f"Answer {index}"}]


def write(folder, columns, features, split="test"):
    """A parquet file in a folder; returns the source's name."""
    folder.mkdir(exist_ok=True)
    Dataset.from_dict(columns, features=Features(features)).to_parquet(str(folder / f"{split}.parquet"))
    return f"hf:{folder}"


@pytest.fixture(scope="module", autouse=True)
def quiet():
    datasets.disable_progress_bars()


@pytest.fixture(scope="module")
def images():
    return [{"bytes": png(index), "path": f"{index}.png"} for index in range(ROWS)]


@pytest.fixture
def captions(tmp_path, images) -> str:
    """Twenty images with two captions each, in the columns of flickr30k."""
    columns = {
        "image": images,
        "caption": [[f"Caption {index}", "A second one"] for index in range(ROWS)],
        "img_id": [str(index) for index in range(ROWS)],
    }
    features = {"image": datasets.Image(), "caption": List(Value("string")), "img_id": Value("string")}
    return write(tmp_path / "captions", columns, features)


@pytest.fixture
def conversations(tmp_path, images) -> str:
    """Twenty images with conversations in the form of LLaVA."""
    columns = {"shot": images, "conversations": [conversation(index) for index in range(ROWS)]}
    return write(tmp_path / "conversations", columns, {"shot": datasets.Image(), "conversations": TURNS}, "train")


@pytest.fixture
def texts(tmp_path) -> str:
    """Twenty conversations without images."""
    return write(
        tmp_path / "texts", {"messages": [conversation(index, "") for index in range(ROWS)]}, {"messages": TURNS}
    )


def test_captions_answer_a_fixed_instruction(captions, tmp_path):
    frozen = freeze(tmp_path, captions, samples=12, held_out=8)
    assert sorted(said(frozen)) == sorted(("Describe the picture.", f"Caption {index}") for index in range(ROWS))
    first = parts(frozen)[0][0]
    stored = Image.open(io.BytesIO(png(int(first.assistant.split()[1])))).convert("RGB")
    assert (first.image.size, first.image.tobytes()) == (stored.size, stored.tobytes())
    asked = freeze(tmp_path, captions, name="asked", instruction="What is it?")
    assert {user for user, _ in said(asked)} == {"What is it?"}


def test_conversations_are_found_by_their_column(conversations, tmp_path):
    frozen = freeze(tmp_path, conversations, samples=12, held_out=8, image_column="shot")
    assert sorted(said(frozen)) == sorted((f"Question {index}?", f"Answer {index}") for index in range(ROWS))


def test_rows_are_drawn_by_seed(captions, tmp_path):
    first, again, other = (
        freeze(tmp_path, captions, name=name, seed=seed) for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert first.sha256 == again.sha256 != other.sha256


def test_rows_of_several_files_are_mixed(tmp_path, images, monkeypatch):
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)
    features = {"image": datasets.Image(), "caption": Value("string")}
    for part in range(4):
        columns = {"image": images[part * 5 :][:5], "caption": [f"{part} {index}" for index in range(5)]}
        source = write(tmp_path / "parts", columns, features, f"train-0000{part}-of-00004")
    answers = [answer for _, answer in said(freeze(tmp_path, source, 5, 5))]
    assert len(set(answers)) == 10
    assert len({answer[0] for answer in answers}) > 2
    again = freeze(tmp_path, source, 5, 5, "again")
    assert answers == [answer for _, answer in said(again)]


def test_held_out_rows_share_no_image_with_calibration(tmp_path, images):
    columns = {"image": images * 2, "caption": [f"Caption {index}" for index in range(2 * ROWS)]}
    folder = write(tmp_path / "twice", columns, {"image": datasets.Image(), "caption": Value("string")})
    frozen = freeze(tmp_path, folder, samples=10, held_out=10)
    seen, held_out = shown(frozen)
    assert not seen & held_out


def test_an_image_that_cannot_be_decoded_is_replaced_and_counted(tmp_path, images):
    damaged = [{**image, "bytes": image["bytes"][:60]} if i in (3, 8) else image for i, image in enumerate(images)]
    columns = {"image": [*damaged, None], "caption": [f"Caption {index}" for index in range(ROWS + 1)]}
    folder = write(tmp_path / "damaged", columns, {"image": datasets.Image(), "caption": Value("string")})
    with pytest.warns(
        UserWarning, match=r"3 of 21 samples drawn from hf:.*, split test cannot be used; the first: .*row"
    ):
        frozen = freeze(tmp_path, folder, samples=10, held_out=8)
    assert not {answer for _, answer in said(frozen)} & {"Caption 3", "Caption 8", "Caption 20"}
    assert frozen.skipped == 3
    assert open_calibration(frozen.folder) == frozen


def test_text_comes_from_a_data_set_of_its_own(captions, texts, tmp_path):
    frozen = freeze(tmp_path, captions, 8, 4, text_share=0.25, text_source=texts, text_split="test")
    assert [sum(c.image is None for c in part) for part in parts(frozen)] == [2, 1]
    assert frozen.text_only == 2


def test_two_columns_of_text_are_a_conversation(captions, tmp_path):
    columns = {"prompt": ["Why?", "How?"], "response": ["Because.", "Like this."]}
    folder = write(tmp_path / "pairs", columns, {"prompt": Value("string"), "response": Value("string")})
    frozen = freeze(tmp_path, captions, 2, 2, text_share=0.5, text_source=folder)
    assert set(said(frozen)) > {("Why?", "Because."), ("How?", "Like this.")}


def test_rows_with_images_are_no_text(captions, conversations, tmp_path):
    with pytest.raises(InputError, match=r"more than half, .*expected at most 0 <image>, and not 1"):
        freeze(tmp_path, captions, text_share=0.5, text_source=conversations)


def test_paths_are_looked_up_in_the_folder_of_images(tmp_path):
    (tmp_path / "images").mkdir()
    for index in range(ROWS):
        (tmp_path / "images" / f"{index}.png").write_bytes(png(index))
    columns = {"image": [f"{i}.png" for i in range(ROWS)], "conversations": [conversation(i) for i in range(ROWS)]}
    folder = write(tmp_path / "paths", columns, {"image": Value("string"), "conversations": TURNS})
    assert len(said(freeze(tmp_path, folder, images=str(tmp_path / "images")))) == 8
    with pytest.raises(InputError, match=r"more than half, .*a path needs calibration\.images"):
        freeze(tmp_path, folder, name="without")


@pytest.mark.parametrize(
    ("column", "feature", "cell"),
    [
        ("image", Value("binary"), lambda image: image["bytes"]),
        ("images", List(datasets.Image()), lambda image: [image]),
        ("img", {"bytes": Value("binary"), "path": Value("string")}, lambda image: image),
    ],
)
def test_images_may_be_bytes_or_a_list_of_one(tmp_path, images, column, feature, cell):
    columns = {column: [cell(image) for image in images], "text": [str(index) for index in range(ROWS)]}
    folder = write(tmp_path / "forms", columns, {column: feature, "text": Value("string")})
    first = parts(freeze(tmp_path, folder))[0][0]
    assert first.image.getpixel((0, 0)) == (int(first.assistant), 200, 0)


def test_rows_with_several_images_are_no_samples(tmp_path, images):
    columns = {"images": [images[:2]] * ROWS, "text": ["x"] * ROWS}
    folder = write(tmp_path / "several", columns, {"images": List(datasets.Image()), "text": Value("string")})
    with pytest.raises(InputError, match=r"more than half, 9 of 9 .*expected one image"):
        freeze(tmp_path, folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_column": "photo"}, r"image_column: found 'photo', .* are image, caption, img_id"),
        ({"text_column": "story"}, r"text_column: found 'story', .* are image, caption, img_id"),
        ({"conversation_column": "turns"}, r"conversation_column: found 'turns', .* are image, caption, img_id"),
        ({"split": "train"}, r"split: found 'train', expected one of test, the splits of hf:"),
        ({"subset": "small"}, r"source: cannot open 'hf:.*as a data set: .*small"),
        ({"revision": "abc"}, r"revision: found 'abc', but .* is a folder and has none"),
        ({"samples": 18, "held_out": 3}, r"samples: found 18, .* takes 21 .*at most the 20 of hf:.*, split test"),
    ],
)
def test_what_the_data_set_does_not_have_is_named(captions, tmp_path, changes, message):
    with pytest.raises(InputError, match=rf"calibration\.{message}"):
        freeze(tmp_path, captions, **changes)


def test_a_column_that_is_not_known_by_name_has_to_be_given(conversations, texts, tmp_path):
    with pytest.raises(InputError, match=r"image_column: not given, and none of image, .* are shot, conversations"):
        freeze(tmp_path, conversations)
    with pytest.raises(InputError, match=r"text_source: found hf:.* with the columns .*expected one of conversations"):
        columns = {"sentence": ["a", "b"]}
        folder = write(tmp_path / "sentences", columns, {"sentence": Value("string")})
        open_hub_texts(CalibrationSettings(text_share=0.5, text_source=folder))


def test_a_data_set_of_several_splits_needs_a_choice_unless_one_is_for_training(captions, tmp_path):
    folder = Path(captions.removeprefix("hf:"))
    (folder / "validation.parquet").write_bytes((folder / "test.parquet").read_bytes())
    with pytest.raises(InputError, match=r"split: found 'train', expected one of .*validation.*, the splits of"):
        freeze(tmp_path, captions)
    assert open_hub_images(CalibrationSettings(source=captions, split="validation")).name.endswith("split validation")


@pytest.mark.parametrize("content", [None, b"", b"PAR1 and nothing more"])
def test_a_folder_that_is_no_data_set_is_refused(tmp_path, content):
    (tmp_path / "bad").mkdir()
    if content is not None:
        (tmp_path / "bad" / "train.parquet").write_bytes(content)
    with pytest.raises(InputError, match=r"hf:.*bad"):
        freeze(tmp_path, f"hf:{tmp_path / 'bad'}")


def test_what_is_streamed_from_the_hub_is_a_commit_and_it_is_recorded(captions, tmp_path, monkeypatch):
    asked, load = {}, datasets.load_dataset

    def dataset_info(self, name, revision=None):
        asked["info"] = (name, revision)
        return huggingface_hub.hf_api.DatasetInfo(id=name, sha=COMMIT)

    def load_dataset(name, subset, **options):
        asked["load"] = (name, subset, options)
        return load(captions.removeprefix("hf:"), streaming=True)

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", dataset_info)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    frozen = freeze(tmp_path, "hf:maker/images", revision="main", subset="small")
    assert asked["info"] == ("maker/images", "main")
    assert asked["load"] == ("maker/images", "small", {"revision": COMMIT, "streaming": True})
    assert open_calibration(frozen.folder).revision == COMMIT


@pytest.mark.parametrize("name", ["/nowhere/at/all", "./nowhere", "flickr30k"])
def test_a_folder_that_is_not_there_is_not_asked_of_the_hub(tmp_path, name):
    with pytest.raises(InputError, match=r"calibration.source: found .*, no such folder"):
        freeze(tmp_path, f"hf:{name}")


def test_a_name_that_the_hub_does_not_allow_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"calibration.source: found 'hf:maker/an image', expected hf:OWNER/NAME"):
        freeze(tmp_path, "hf:maker/an image")


def test_offline_the_hub_is_refused_in_words(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"hub may not be asked for lmms-lab/flickr30k, .*HF_HUB_OFFLINE is set"):
        freeze(tmp_path, "hf:lmms-lab/flickr30k")


def test_a_hub_that_cannot_be_reached_is_trouble_that_may_pass(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ConnectionError, match=r"cannot be reached for the data set maker/images at revision abc"):
        freeze(tmp_path, "hf:maker/images", revision="abc")


@pytest.mark.parametrize(
    ("status", "error", "message"),
    [
        *((status, InputError, "no folder maker/none, and the hub gives no data set") for status in (401, 403, 404)),
        (501, ConnectionError, "the hub cannot be reached for the data set maker/none at revision abc"),
    ],
)
def test_what_the_hub_refuses_is_bad_input_and_its_troubles_are_not(tmp_path, hub, status, error, message):  # noqa: F811
    hub.fail("maker/none", status)
    with pytest.raises(error, match=message):
        freeze(tmp_path, "hf:maker/none", revision="abc")
