"""Normalisation and VQA accuracy against cases worked out by hand."""

import pytest

from bivlm.evaluation.vqa_accuracy import normalise, vqa_accuracy


@pytest.mark.parametrize(
    ("answer", "normalised"),
    [
        ("Blue", "blue"),
        ("the Blue car", "blue car"),
        ("a  an the", ""),
        ("two", "2"),
        ("none", "0"),
        ("ten dogs", "10 dogs"),
        ("eleven", "eleven"),
        ("1,000", "1000"),
        ("3.5", "3.5"),
        ("3.", "3"),
        ("u.s.a.", "usa"),
        ("." * 40 + "x", "." * 8 + "x"),  # the published code drops 32 full stops and no more
        ("yes!", "yes"),
        ("black/white", "black white"),
        ("black / white", "black white"),
        ("t-shirt", "t shirt"),
        ("t- shirt t-shirt", "t shirt tshirt"),  # a hyphen beside a space: all of them vanish
        ("(red)", "red"),
        ('"coca cola"', "coca cola"),
        ("dont", "don't"),
        ("don't", "don't"),
        ("couldntve", "couldntve"),  # two apostrophes left out: not in the published table
        ("somebody'd", "somebodyd"),  # the published table has this one the other way round
        ("couldnt've", "couldn't've"),
        ("yall", "y'all"),
        ("well", "well"),  # a word of its own, not "we'll"
        ("men's", "men 's"),
        ("line\nbreak\ttab", "line break tab"),
        ("what?", "what"),
    ],
)
def test_answers_are_normalised_as_the_evaluation_servers_do(answer, normalised):
    assert normalise(answer) == normalised


@pytest.mark.parametrize(
    ("matching", "accuracy"),
    # Leaving one of m matches out leaves m - 1, leaving another answer out leaves m: (m (m-1) + (10-m) m) / 30, capped.
    [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)],
)
def test_of_ten_people_four_must_agree_for_full_accuracy(matching, accuracy):
    answers = ["cup"] * matching + ["mug"] * (10 - matching)
    assert vqa_accuracy("Cup.", answers) == pytest.approx(accuracy)


def test_prediction_and_answers_are_normalised_alike():
    assert vqa_accuracy("The two cups", ["2 cups"] * 10) == 1.0


def test_an_empty_prediction_matches_nothing_that_was_said():
    assert vqa_accuracy("", ["cup"] * 10) == 0.0
