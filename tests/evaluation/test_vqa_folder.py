"""A folder of questions: what it accepts, what it asks, what it scores, and how it complains."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from bivlm.errors import InputError
from bivlm.evaluation.benchmark import load_benchmark
from bivlm.sources.samples import VqaSample

GOOD = {"image": "blue.jpg", "question": "What colour is it?", "answers": ["blue"]}


def _load(folder, limit=None):
    return load_benchmark(f"vqa:{folder}", limit)


def _score(write_folder, prediction, **line):
    benchmark = _load(write_folder({**GOOD, **line}))
    return benchmark.score(next(iter(benchmark)), prediction)


def test_lines_become_questions(write_folder):
    folder = write_folder(GOOD, b"", {**GOOD, "image": "images/red.png", "question_id": "r", "category": "colour"})
    first, second = _load(folder)
    assert (first.question_id, first.image_id, first.question) == ("1", "blue.jpg", "What colour is it?")
    assert (second.question_id, second.image_id, second.category) == ("r", "images/red.png", "colour")
    assert second.image.getpixel((0, 0)) == (255, 0, 0)
    assert first.answers == ("blue",)
    assert first.choices is None


def test_a_limit_takes_the_first_lines(write_folder):
    folder = write_folder(*({**GOOD, "question_id": name} for name in "abc"))
    assert [sample.question_id for sample in _load(folder, 2)] == ["a", "b"]


def test_the_bytes_that_begin_a_windows_file_are_no_error(write_folder):
    assert len(_load(write_folder(b"\xef\xbb\xbf" + json.dumps(GOOD).encode()))) == 1


@pytest.mark.parametrize(
    ("prediction", "score"),
    [("blue", 1.0), (" Blue.\n", 1.0), ("NAVY", 1.0), ("blue car", 0.0), ("a blue", 0.0), ("", 0.0), ("blu", 0.0)],
)
def test_a_prediction_is_right_if_it_equals_an_answer(write_folder, prediction, score):
    assert _score(write_folder, prediction, answers=["blue", "Navy."]) == score


def test_options_are_appended_with_letters(write_folder):
    sample = next(iter(_load(write_folder({**GOOD, "choices": ["red", "blue"], "answers": ["blue"]}))))
    assert sample.question.startswith("What colour is it?\nA. red\nB. blue\n")
    assert sample.choices == ("red", "blue")
    assert sample.answers == ("B",)


@pytest.mark.parametrize("answers", [["B"], ["b"], ["blue"], ["Blue."], ["B", "blue"]])
def test_answers_may_be_letters_or_texts_of_options(write_folder, answers):
    line = {"choices": ["red", "blue"], "answers": answers}
    assert [_score(write_folder, said, **line) for said in ("B", "b.", "blue", "A", "B. blue")] == [1, 1, 0, 0, 0]


def test_an_option_that_is_its_own_letter_is_clear(write_folder):
    assert _score(write_folder, "A", choices=["a", "x"], answers=["a"]) == 1.0


MALFORMED = {
    "not JSON": (b'{"image": ', "not valid JSON"),
    "no object": (b"[1]", "expected a JSON object"),
    "not UTF-8": (b'{"image": "\xff"}', "not UTF-8"),
    "key twice": (b'{"image": "a", "image": "b"}', "the key 'image' is given twice"),
    "no image": ({"question": "?", "answers": ["x"]}, "key 'image' is missing"),
    "no question": ({"image": "blue.jpg", "answers": ["x"]}, "key 'question' is missing"),
    "no answers": ({"image": "blue.jpg", "question": "?"}, "key 'answers' is missing"),
    "unknown key": ({**GOOD, "choice": ["a"]}, "key 'choice': .*one of the keys image, question, answers"),
    "image not text": ({**GOOD, "image": 3}, "key 'image': found 3, expected a string"),
    "image not there": ({**GOOD, "image": "green.png"}, "key 'image': found 'green.png'.*no such file"),
    "image is a folder": ({**GOOD, "image": "images"}, "key 'image': .*no such file"),
    "image outside": ({**GOOD, "image": "../secret.png"}, "key 'image': found '../secret.png'.*not outside"),
    "image by another way": ({**GOOD, "image": "images/../../secret.png"}, "key 'image': .*not outside"),
    "image absolute": ({**GOOD, "image": "/etc/hostname"}, "key 'image': .*not outside"),
    "image with NUL": ({**GOOD, "image": "a\0b"}, "key 'image': .*expected the path of an image"),
    "image name too long": ({**GOOD, "image": "x" * 5000}, "key 'image': .*expected the path of an image"),
    "image is no image": ({**GOOD, "image": "data.jsonl"}, "key 'image': .*expected an image"),
    "question empty": ({**GOOD, "question": " "}, "key 'question': found ' ', expected a string that is not empty"),
    "question null": ({**GOOD, "question": None}, "key 'question': found None"),
    "question broken": ({**GOOD, "question": "\ud800"}, "key 'question': .*surrogates"),
    "answers text": ({**GOOD, "answers": "blue"}, "key 'answers': found 'blue', expected a list of strings"),
    "answers empty": ({**GOOD, "answers": []}, r"key 'answers': found \[\], expected a list of strings, at least one"),
    "answers number": ({**GOOD, "answers": [4]}, "key 'answers': found 4, expected a list of strings"),
    "answers blank": ({**GOOD, "answers": ["blue", ""]}, "key 'answers': found ''"),
    "answers punctuation": ({**GOOD, "answers": ["..."]}, "key 'answers': .*more than punctuation"),
    "one choice": ({**GOOD, "choices": ["blue"]}, "key 'choices': .*2 to 26 options"),
    "many choices": ({**GOOD, "choices": [str(n) for n in range(27)]}, "key 'choices': .*2 to 26 options"),
    "choices twice": ({**GOOD, "choices": ["blue", "Blue."]}, "key 'choices': .*all different"),
    "choices null": ({**GOOD, "choices": None}, "key 'choices': found None"),
    "answer no choice": ({**GOOD, "choices": ["red", "green"]}, "key 'answers': found 'blue', expected one of .* AB"),
    "letter too high": ({**GOOD, "choices": ["red", "blue"], "answers": ["C"]}, "key 'answers': found 'C'"),
    "two meanings": ({**GOOD, "choices": ["B", "x"], "answers": ["B"]}, "key 'answers': found 'B', .*one meaning"),
    "id twice": ({**GOOD, "question_id": "1"}, "key 'question_id': found '1', expected an id of its own; line 1"),
    "id number": ({**GOOD, "question_id": 8}, "key 'question_id': found 8"),
}  # fmt: skip


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_line_is_named_with_key_value_and_valid_form(write_folder, case):
    line, message = MALFORMED[case]
    folder = write_folder(GOOD, line)
    Image.new("RGB", (4, 4)).save(folder.parent / "secret.png")
    with pytest.raises(InputError, match=rf"(?s){folder}/data.jsonl, line 2.*{message}"):
        _load(folder, limit=1)


def test_questions_that_are_a_link_out_of_the_folder_are_refused(write_folder):
    folder = write_folder(GOOD)
    (folder / "data.jsonl").rename(folder.parent / "secret")
    (folder / "data.jsonl").symlink_to(folder.parent / "secret")
    with pytest.raises(InputError, match=r"data\.jsonl: a link to .*secret, outside the folder"):
        load_benchmark(f"vqa:{folder}")


def test_a_link_out_of_the_folder_is_refused(write_folder):
    folder = write_folder({**GOOD, "image": "link.png"})
    Image.new("RGB", (4, 4)).save(folder.parent / "secret.png")
    (folder / "link.png").symlink_to(folder.parent / "secret.png")
    with pytest.raises(InputError, match="not outside"):
        _load(folder)


def test_an_image_that_breaks_off_is_refused_when_it_is_shown(write_folder):
    folder = write_folder({**GOOD, "image": "noise.png"})
    Image.effect_noise((64, 64), 50).save(folder / "noise.png")
    (folder / "noise.png").write_bytes((folder / "noise.png").read_bytes()[:900])
    with pytest.raises(InputError, match=r"noise\.png: expected an image"):
        list(_load(folder))


def test_formats_that_start_other_programs_are_not_opened(write_folder):
    folder = write_folder({**GOOD, "image": "image.eps"})
    Image.new("RGB", (4, 4)).save(folder / "image.eps")
    with pytest.raises(InputError, match=r"key 'image': .*expected an image"):
        _load(folder)


def test_a_photo_is_turned_upright(write_folder):
    folder = write_folder({**GOOD, "image": "turned.jpg"})
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by a quarter
    Image.new("RGB", (20, 10)).save(folder / "turned.jpg", exif=exif)
    assert next(iter(_load(folder))).image.size == (10, 20)


def test_a_folder_without_questions_is_refused(write_folder, tmp_path):
    with pytest.raises(InputError, match="found no line"):
        _load(write_folder(b"", b"  "))
    with pytest.raises(InputError, match="nowhere: no such folder"):
        _load(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"data\.jsonl: no such file"):
        _load(tmp_path)


def test_the_digest_follows_texts_and_images(write_folder):
    before = _load(write_folder(GOOD)).digest
    assert _load(write_folder(GOOD)).digest == before
    assert _load(write_folder({**GOOD, "answers": ["red"]})).digest != before
    folder = write_folder(GOOD)
    Image.new("RGB", (40, 30), "green").save(folder / "blue.jpg")
    assert _load(folder).digest != before


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(["image", "question", "answers", "choices", "category", "extra"]),
        st.recursive(
            st.none() | st.integers() | st.text(max_size=8) | st.just("blue.jpg"),
            lambda inner: st.lists(inner, max_size=3),
        ),
    )
)
def test_any_object_is_either_a_question_or_an_input_error(write_folder, line):
    folder = write_folder(json.dumps(line).encode())
    try:
        (sample,) = _load(folder)
    except InputError as error:
        assert "data.jsonl, line 1" in str(error)
    else:
        assert isinstance(sample, VqaSample)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.binary(max_size=60))
def test_any_bytes_are_an_input_error(write_folder, content):
    with pytest.raises(InputError, match=r"data\.jsonl"):
        _load(write_folder(content))
