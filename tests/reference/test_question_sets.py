"""Questions are balanced, deterministic and answered by what the scene or the catalogue says."""

import random
import re
from collections import Counter

import pytest

from bivlm.evaluation.vqa_accuracy import vqa_accuracy
from bivlm.reference.catalogue import creatures
from bivlm.reference.question_sets import FAMILIES, QUESTION_SETS, calibration_samples, questions, questions_alone
from bivlm.reference.scenes import SHAPES, draw_scene


@pytest.mark.parametrize("name", QUESTION_SETS)
def test_the_test_split_has_two_thousand_questions_with_distinct_ids(name, monkeypatch):
    monkeypatch.setattr("bivlm.reference.question_sets.render", lambda scene: None)  # most of the time
    ids = [sample.question_id for sample in questions(name)]
    assert len(set(ids)) == len(ids) == 2000


@pytest.mark.parametrize("name", QUESTION_SETS)
def test_questions_are_the_same_every_time(name):
    first, second = (
        [(s.question_id, s.question, s.answers, s.image.tobytes()) for s in questions(name, limit=20)] for _ in range(2)
    )
    assert first == second


@pytest.mark.parametrize("name", QUESTION_SETS)
def test_no_image_is_shared_between_splits(name):
    images = {
        split: {s.image.tobytes() for s in questions(name, split=split, limit=100)}
        for split in ("train", "calibration", "test")
    }
    assert not images["train"] & images["test"]
    assert not images["calibration"] & images["test"]


def test_questions_come_lazily():
    assert next(questions("choice", limit=10**12)).question_id == "choice-test-0-00000"


@pytest.mark.parametrize("arguments", [("seeing", "test"), ("open", "validation")])
def test_unknown_sets_and_splits_are_refused_before_the_first_question(arguments):
    name, split = arguments
    with pytest.raises(ValueError, match="valid are"):
        questions(name, split=split)


@pytest.mark.parametrize("name", ["perception", "cognition"])
def test_two_consecutive_questions_share_an_image_and_one_is_answered_yes(name):
    samples = list(questions(name, limit=200))
    for first, second in zip(samples[::2], samples[1::2], strict=True):
        assert first.image_id == second.image_id
        assert first.category == second.category
        assert {first.answers, second.answers} == {("yes",), ("no",)}


def test_the_letter_of_a_choice_points_at_the_right_option_and_letters_are_balanced():
    letters = Counter()
    for sample in questions("choice", limit=400):
        assert len(set(sample.choices)) == 4
        for letter, option in zip("ABCD", sample.choices, strict=True):
            assert f"\n{letter}. {option}" in sample.question
        letters.update(sample.answers)
    assert set(letters) == set("ABCD")
    assert max(letters.values()) < 0.35 * 400


def test_open_questions_have_ten_answers_with_a_clear_majority():
    for sample in questions("open", limit=200):
        (best, count), *_ = Counter(sample.answers).most_common(1)
        assert len(sample.answers) == 10
        assert count >= 6
        assert vqa_accuracy(best, sample.answers) == 1.0


def _by_name(scene, text):
    colour, shape = re.search(r"(?:on|Is) the (?!digit)(\w+) (\w+)", text).groups()
    return next(t for t in scene.things if (t.colour, t.shape) == (colour, shape))


def _truth(scene, question):
    """The answer to a yes/no question, worked out from its words and the objects of the scene."""
    text, things = question.text, scene.things
    number = re.search(r"(\d)\?", text)
    match question.category:
        case "existence":
            colour, shape = re.search(r"Is there a (\w+) (\w+) in", text).groups()
            return any((t.colour, t.shape) == (colour, shape) for t in things)
        case "color":
            shape, colour = re.search(r"Is the (\w+) (\w+)\?", text).groups()
            return any((t.shape, t.colour) == (shape, colour) for t in things)
        case "position":
            axis = re.search(r"in (row|column)", text).group(1)
            return getattr(_by_name(scene, text), axis) == int(number.group(1))
        case "count":
            colour = re.search(r"number of (\w+) objects", text).group(1)
            return sum(t.colour == colour for t in things) == int(number.group(1))
        case "OCR":
            return _by_name(scene, text).digit == int(number.group(1))
        case "numerical_comparison":
            return _by_name(scene, text).digit > int(number.group(1))
        case "numerical_parity":
            return ("odd" in text) == bool(_by_name(scene, text).digit % 2)
        case "catalogue_home" | "catalogue_trade":
            name, value = re.search(r"Does a (\w+) (?:live in|work as a) (\w+)\?", text).groups()
            creature = next(c for c in creatures() if c.name == name)
            return value in (creature.home, creature.trade)
    raise AssertionError(f"no check for {question.category}")


def _every_family(name, scenes, seed):
    """Questions of every family of a set about random scenes, with the scene."""
    rng = random.Random(seed)
    for _ in range(scenes):
        scene = draw_scene(rng, "test")
        for family in FAMILIES[name]:
            yield from ((scene, question) for question in family(rng, scene))


@pytest.mark.parametrize("name", ["perception", "cognition"])
def test_yes_and_no_agree_with_the_scene(name):
    for scene, question in _every_family(name, 100, seed=11):
        assert question.answers == ("yes" if _truth(scene, question) else "no",), question.text


def test_open_questions_about_absent_things_are_unanswerable_and_only_those():
    ends = {"What digit": "on the {0.name}", "What colour": "is the {0.shape}", "What shape": "is {0.colour}"}
    for scene, question in _every_family("open", 200, seed=12):
        asked = question.text.split("?")[0]
        if end := next((end for begin, end in ends.items() if asked.startswith(begin)), None):
            present = any(asked.endswith(end.format(thing)) for thing in scene.things)
            assert (question.target == "unanswerable") == (not present), question.text


def test_open_answers_about_shapes_name_a_shape_of_the_scene():
    for scene, question in _every_family("open", 100, seed=13):
        if question.category == "shape":
            assert question.target in SHAPES
            assert any(t.shape == question.target and t.colour in question.text for t in scene.things)


def test_the_catalogue_has_distinct_names_and_uses_every_value_evenly():
    names = Counter(c.name for c in creatures())
    assert max(names.values()) == 1
    for attribute in ("home", "food", "trade"):
        counts = Counter(c[attribute] for c in creatures())
        assert max(counts.values()) - min(counts.values()) <= 1


@pytest.mark.parametrize("name", ["perception", "cognition"])
def test_the_numbers_in_a_question_do_not_give_its_answer_away(name):
    counts = Counter()
    for question in questions_alone(name):
        if number := re.search(r"(?:greater than|objects|row|column) \d", question.text):
            counts[number.group(), question.answers[0]] += 1
    for number in {number for number, _ in counts}:
        yes, no = counts[number, "yes"], counts[number, "no"]
        assert abs(yes - no) < 4 * (yes + no) ** 0.5, number


def test_calibration_conversations_mix_sets_and_captions_and_repeat_for_a_seed():
    first, second, other = calibration_samples(10, 1), calibration_samples(10, 1), calibration_samples(10, 2)
    assert [(c.user, c.assistant) for c in first] == [(c.user, c.assistant) for c in second]
    assert [c.user for c in first] != [c.user for c in other]
    assert [c.image.tobytes() for c in first] == [c.image.tobytes() for c in second]
    assert sum("row" in c.assistant for c in first) == 2
