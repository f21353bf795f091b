"""The four sets are scored as the benchmarks that they are shaped like."""

import pandas as pd
import pytest

from bivlm.errors import InputError
from bivlm.evaluation.benchmark import load_benchmark
from bivlm.evaluation.reference_sets import chance


def _run(task, limit, answer):
    """Scores and figures of a model that answers with `answer(sample)`."""
    benchmark = load_benchmark(task, limit)
    rows = [(s.category, s.image_id, answer(s), benchmark.score(s, answer(s))) for s in benchmark]
    outcomes = pd.DataFrame(rows, columns=["category", "image_id", "prediction", "score"])
    return outcomes["score"].mean(), benchmark.summarize(outcomes)


@pytest.mark.parametrize("name", ["perception", "cognition"])
def test_saying_yes_to_everything_gets_half_of_the_questions_and_no_image(name):
    score, figures = _run(f"reference:{name}", 100, lambda sample: "Yes.")
    assert score == 0.5
    assert figures["mme_score"] == 50 * figures["mme_max"] / 200
    assert figures["unreadable"] == 0.0


@pytest.mark.parametrize("name", ["perception", "cognition"])
def test_the_right_answers_reach_the_maximum(name):
    score, figures = _run(f"reference:{name}", 200, lambda sample: sample.answers[0].capitalize())
    assert score == 1.0
    assert figures["mme_score"] == figures["mme_max"]


def test_a_choice_is_right_by_its_letter_and_wrong_and_reported_without():
    score, figures = _run("reference:choice", 40, lambda sample: f"({sample.answers[0]})")
    assert score == 1.0
    assert set(figures.values()) == {100.0, 0.0}
    score, figures = _run("reference:choice", 40, lambda sample: "no idea")
    assert (score, figures["unreadable"]) == (0.0, 100.0)


def test_open_questions_are_scored_by_agreement():
    score, figures = _run("reference:open", 60, lambda sample: max(sample.answers, key=sample.answers.count).upper())
    assert score == 1.0
    assert "unreadable" not in figures


def test_there_are_two_thousand_questions_and_a_limit_takes_the_first():
    assert len(load_benchmark("reference:open")) == len(load_benchmark("reference:open", 10**6)) == 2000
    first = [sample.question_id for sample in load_benchmark("reference:open", 7)]
    assert first == [sample.question_id for sample in load_benchmark("reference:open", 9)][:7]
    assert len(load_benchmark("reference:open", 7)) == 7


def test_an_unknown_set_is_refused_with_the_valid_ones():
    with pytest.raises(InputError, match="'vision' is not known; valid: perception, cognition, choice, open"):
        load_benchmark("reference:vision")


def test_the_digest_tells_questions_apart_and_stays():
    digests = [load_benchmark(f"reference:{name}", n).digest for name, n in (("open", 5), ("open", 6), ("choice", 5))]
    assert len(set(digests)) == 3
    assert digests[0] == load_benchmark("reference:open", 5).digest


def test_chance_is_what_the_best_constant_answer_scores(monkeypatch):
    monkeypatch.setattr("bivlm.reference.question_sets.render", lambda scene: None)  # most of the time
    assert chance("perception") == chance("cognition") == 50.0
    assert chance("choice") == 25.0
    constant, _ = _run("reference:open", 2000, lambda sample: "unanswerable")
    assert 100 * constant <= chance("open") < 35
