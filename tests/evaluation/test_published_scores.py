"""The scores of MME, MMMU, ScienceQA and VizWiz, worked out by hand."""

import pandas as pd
import pytest
from published_data import mme_rows, mmmu_rows, scienceqa_rows, vizwiz_rows, write_set
from scipy import stats

from bivlm.evaluation.benchmark import load_benchmark
from bivlm.evaluation.metrics import mme_interval
from bivlm.evaluation.mmmu_answers import is_among, open_readings, option_letter


@pytest.fixture
def summary(tmp_path):
    """Scores and figures of a set's questions when these answers are given, in order."""

    def summarize(kind, answers, rows=None):
        benchmark = load_benchmark(f"{kind}:{write_set(kind, tmp_path, rows)}")
        asked = list(benchmark)
        scores = [benchmark.score(sample, answer) for sample, answer in zip(asked, answers, strict=True)]
        columns = {
            name: [getattr(sample, name) for sample in asked] for name in ("question_id", "image_id", "category")
        }
        outcomes = pd.DataFrame({**columns, "prediction": answers, "score": scores})
        return scores, benchmark.summarize(outcomes), benchmark.intervals(outcomes)

    return summarize


def test_mme_with_both_questions_of_an_image_right_one_right_and_none(summary):
    # count: both of image 1, one of image 2; code_reasoning: none of image 3.
    scores, figures, intervals = summary("mme", ["Yes", "No", "yes.", "Yes", "No", "perhaps"])
    assert scores == [1, 1, 1, 0, 0, 0]
    assert figures == {
        "perception": 75.0 + 50.0,
        "cognition": 0.0,
        "mme_score": 125.0,
        "mme_max": 400.0,
        "code_reasoning/acc": 0.0,
        "code_reasoning/acc_plus": 0.0,
        "count/acc": 75.0,
        "count/acc_plus": 50.0,
        "unparsable": 1.0,
    }
    # Of two images the draw brings both of either, or one of each: 100 + 100, 50 + 0, 75 + 50.
    assert intervals == {"perception": [50.0, 200.0], "cognition": [0.0, 0.0]}


def test_mme_of_all_answers_right_is_as_high_as_it_gets(summary):
    rows = [
        {**row, "category": category, "question_id": f"{category}/1.png"}
        for category in (
            *("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR"),
            *("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning"),
        )
        for row in mme_rows()[:2]
    ]
    _, figures, intervals = summary("mme", ["Yes", "No"] * 14, rows)
    assert (figures["perception"], figures["cognition"]) == (2000.0, 800.0)
    assert intervals == {"perception": [2000.0, 2000.0], "cognition": [800.0, 800.0]}


def test_the_interval_of_an_mme_score_is_the_bootstrap_over_its_images():
    right = [(i * 7919 % 10 < 7, i * 104729 % 10 < 6) for i in range(200)]
    rows = [("count", str(i), float(each)) for i, pair in enumerate(right) for each in pair]
    outcomes = pd.DataFrame(rows, columns=["category", "image_id", "score"])
    theirs = stats.bootstrap(
        ([50 * (a + b) + 100 * (a and b) for a, b in right],),
        lambda images, axis: images.mean(axis),
        n_resamples=4000,
        method="percentile",
        rng=1,
    ).confidence_interval
    assert mme_interval(outcomes, ["count"]) == pytest.approx(tuple(theirs), abs=2.0)


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("(B)", "B"),
        ("B", "B"),
        ("B.", "B"),
        ("B. blue car", "B"),
        ("Answer: B", "B"),
        ("A: red", None),  # a colon is no form
        ("(A) or rather (C)", "C"),  # the last one wins
        ("(A), because B is wrong", "A"),  # brackets come first
        ("A B or A", "A"),
        ("b", None),  # only capitals
        ("made in the USA", "A"),  # the end of a word, as published
        ("I would say that it is the BLUE CAR", "B"),  # more than five words: by text
        ("it is not red but a blue car", "B"),
        ("a blue car", None),  # five words or fewer
        ("", None),
        ("E", None),
    ],
)
def test_letters_in_all_published_forms(text, letter):
    assert option_letter(text, ["red", "blue car", "neither of the two", "all"]) == letter


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        ("24.32", "24.32", True),
        ("24.3199", "24.32", True),  # two places
        ("24.3", "24.32", False),
        ("The area is 24.32 cm^2.", "24.32", True),
        ("x = 24.32", "24.32", True),
        ("1,000", "1000", True),
        ("1e3", "1000", True),
        ("-5", "5", False),
        ("so it is a Circle", "circle", True),
        ("semicircle", "circle", True),  # a part is enough, as published
        ("accent", "c", False),  # a single letter needs a space beside it
        ("vitamin c is it, so c d", "c", True),
        ("it is a square\nso a circle", "square", True),  # every line counts
        ("square, thus a circle", "square", False),  # only what follows the last announcement
        ("", "circle", False),
    ],
)
def test_open_answers_by_number_and_by_text(text, answer, right):
    assert is_among(open_readings(text), [answer]) is right


def test_mmmu_counts_what_cannot_be_read_as_wrong(summary):
    scores, figures, _ = summary("mmmu", ["hard to say", "(A)", "about 24.32", "square"])
    assert scores == [0, 1, 1, 0]
    assert figures == {
        "Art and Design/acc": 100.0,
        "Business/acc": 0.0,
        "Science/acc": 50.0,
        "Accounting/acc": 0.0,
        "Art_Theory/acc": 100.0,
        "Math/acc": 50.0,
        "unparsable": 1.0,
    }


def test_an_open_question_may_have_several_answers(summary, tmp_path):
    from datasets import List, Value
    from published_data import MMMU, MMMU_FILE, write

    row = {**mmmu_rows()[2], "answer": ["24.32", "half"]}
    folder = write(tmp_path / "lists", [row], {**MMMU, "answer": List(Value("string"))}, MMMU_FILE)
    benchmark = load_benchmark(f"mmmu:{folder}")
    (sample,) = benchmark
    assert [benchmark.score(sample, said) for said in ("24.32", "one half", "a third")] == [1, 1, 0]


@pytest.mark.parametrize(
    ("said", "score"),
    [
        ("A", 1),
        ("a", 1),
        ("A. a rock", 1),
        (" A.\n", 1),
        ("B. a river", 0),
        ("a. a rock", 0),
        ("A) a rock", 0),
        ("a rock", 0),
        ("(A)", 0),
        ("The answer is A.", 0),
        ("C", 0),
        ("", 0),
    ],
)
def test_scienceqa_wants_the_letter_or_a_text_that_begins_with_it(summary, said, score):
    scores, figures, _ = summary("scienceqa", [said], scienceqa_rows()[:1])
    assert scores == [score]
    assert figures["unparsable"] == (said not in ("A", "a", "A. a rock", " A.\n", "B. a river"))


@pytest.mark.parametrize(
    ("matching", "score"),
    # Leaving one of m out leaves m - 1, leaving another out leaves m: (m (m-1) + (10-m) m) / 30, capped.
    [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0)],
)
def test_vizwiz_counts_the_people_who_agree(summary, matching, score):
    row = {**vizwiz_rows()[0], "answers": ["The Mug."] * matching + ["cup"] * (10 - matching)}
    assert summary("vizwiz", ["mug"], [row])[0] == [pytest.approx(score)]


def test_vizwiz_reads_up_to_where_the_model_talks_to_itself(summary):
    scores, figures, _ = summary("vizwiz", ["green ASSISTANT: red", "No"])
    assert scores == pytest.approx([0.9, 0.3])  # three said green, one said no
    assert figures == {"other/acc": pytest.approx(90.0), "unanswerable/acc": pytest.approx(30.0)}


def test_what_is_scored_without_looking(tmp_path):
    found = {kind: load_benchmark(f"{kind}:{write_set(kind, tmp_path / kind)}").chance() for kind in _CHANCES}
    assert found == pytest.approx(_CHANCES)


_CHANCES = {
    "mme": 50.0,  # always yes
    "mmmu": 100 * (1 / 3 + 1 / 3) / 4,  # a letter, and nothing for the open questions
    "scienceqa": 100 * (1 / 2 + 1 / 4) / 2,
    "vizwiz": 100 * (0 + 1) / 2,  # always "unanswerable"
}
