"""What a text says is read as the benchmarks read it."""

import pytest

from bivlm.evaluation.answers import letter, plain, yes_or_no


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("yes", "yes"),
        ("No.", "no"),
        (" Y ", "yes"),
        ("n", "no"),
        ("Yes, there is.", "yes"),
        ("no, yes", "no"),  # only the first four characters count
        ("Noyes", "no"),
        ("** yes", None),  # "yes" is not complete within them
        ("*yes*", "yes"),
        ("I think so", None),
        ("nothing", "no"),
        ("maybe yes", None),
        ("", None),
        ("x", None),
    ],
)
def test_yes_and_no_are_read_within_the_first_four_characters(text, said):
    assert yes_or_no(text) == said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("B", "B"),
        ("b.", "B"),
        ("(C)", "C"),
        ("B. plums", "B"),
        ("The answer is (A), not (B)", "B"),  # the last one wins
        ("(A) because B. is wrong", "A"),  # brackets come before full stops
        ("A or B. plums", "B"),  # full stops before bare letters
        ("Option D", "D"),
        ("USA", None),
        ("E", None),  # of four options
        ("I'd say plums", None),
        ("A's", None),
        ("plums", None),
        ("", None),
    ],
)
def test_a_letter_is_found_where_it_stands_alone(text, said):
    assert letter(text, 4) == said


def test_as_many_letters_are_valid_as_there_are_options():
    assert letter("E", 5) == "E"


@pytest.mark.parametrize(
    ("text", "read"),
    [
        (" Two Cats.\n", "two cats"),
        ("cats . ", "cats"),
        ("U.S.A.", "u.s.a"),
        ("Ja!?", "ja"),
        ("50%", "50%"),
        ("...", ""),
    ],
)
def test_plain_drops_case_outer_white_space_and_final_punctuation(text, read):
    assert plain(text) == read
