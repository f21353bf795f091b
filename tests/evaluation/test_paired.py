"""Paired losses against simulation, published figures and brute force."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import multinomial

from bivlm.errors import InputError
from bivlm.evaluation.paired import largest_difference, largest_loss, loss_between, mcnemar, questions_needed


def outcomes(scores, per_image=1):
    names = [str(i) for i in range(len(scores))]
    images = [str(i // per_image) for i in range(len(scores))]
    return pd.DataFrame({"question_id": names, "image_id": images, "score": np.asarray(scores, float)})


def test_the_loss_is_the_difference_of_the_means():
    found = loss_between(outcomes([1, 1, 1, 0, 0.5]), outcomes([1, 0, 0.5, 1, 0.5]))
    assert found.loss == pytest.approx(100 * (3.5 - 3) / 5)
    assert (found.n, found.worse, found.better) == (5, 2, 1)
    assert found.low < found.loss < found.high


def test_no_change_among_few_questions_is_not_certainty():
    """Rule of three: of n questions without a loss up to about 3 / n may be lost."""
    for n in (50, 200, 1000):
        found = loss_between(outcomes([1] * n), outcomes([1] * n))
        assert found.loss == 0
        assert 200 / n < found.high < 500 / n
        assert found.low == pytest.approx(-found.high)
        assert found.p_value == 1


@pytest.mark.parametrize(("down", "up"), [(0.02, 0.01), (0.1, 0.05), (0.3, 0.1)])
def test_the_interval_covers_the_truth_as_often_as_it_says(down, up):
    random = np.random.default_rng(0)
    covered = 0
    for _ in range(300):
        change = random.choice([1, -1, 0], p=[down, up, 1 - down - up], size=200)
        before = np.where(change == 0, random.integers(0, 2, 200), change == 1)
        found = loss_between(outcomes(before), outcomes(before - change))
        covered += found.low <= 100 * (down - up) <= found.high
    assert covered >= 0.92 * 300


def test_questions_about_one_image_count_as_one():
    """Twenty images whose ten questions are all lost or all kept: the interval is that of twenty, not two hundred."""
    lost = np.repeat([1] * 4 + [0] * 16, 10)
    alone = loss_between(outcomes(np.ones(200)), outcomes(1 - lost))
    together = loss_between(outcomes(np.ones(200), 10), outcomes(1 - lost, 10))
    assert together.high - together.low > 2.5 * (alone.high - alone.low)


@pytest.mark.parametrize(
    ("worse", "better", "p"), [(0, 0, 1.0), (1, 0, 1.0), (5, 0, 0.0625), (10, 2, 0.0386), (6, 6, 1.0)]
)
def test_mcnemars_test_is_that_of_the_tables(worse, better, p):
    assert mcnemar(worse, better) == pytest.approx(p, abs=5e-5)


@given(st.integers(0, 200), st.integers(0, 200))
def test_mcnemars_test_is_symmetric_and_a_probability(worse, better):
    assert 0 < mcnemar(worse, better) <= 1
    assert mcnemar(worse, better) == mcnemar(better, worse)


def test_other_questions_are_refused():
    with pytest.raises(InputError, match="the same questions"):
        loss_between(outcomes([1, 0]), outcomes([1, 0]).iloc[::-1])


@pytest.mark.parametrize(("n", "confidence"), [(4, 0.95), (50, 0.95), (250, 0.9), (1000, 0.99)])
def test_without_any_change_the_largest_loss_is_what_so_many_questions_cannot_exclude(n, confidence):
    """The share of which no one is seen among n with probability 1 - confidence."""
    found = largest_loss(outcomes([1] * n), outcomes([1] * n), confidence)
    assert found.loss == 0
    assert found.largest == pytest.approx(100 * (1 - (1 - confidence) ** (1 / n)))


@pytest.mark.parametrize("down", [0.01, 0.05, 0.15, 0.3])
@pytest.mark.parametrize("up", [0.0, 0.01, 0.05, 0.2])
@pytest.mark.parametrize("n", [30, 100])
def test_the_largest_loss_is_passed_no_more_often_than_its_confidence_allows(down, up, n):
    """The chance that the true loss lies above the end, summed over all outcomes that there are."""
    outcomes_there_are = np.array([(fell, rose) for fell in range(n + 1) for rose in range(n + 1 - fell)])
    counts = np.column_stack([outcomes_there_are, n - outcomes_there_are.sum(1)])
    chances = multinomial.pmf(counts, n, [down, up, 1 - down - up])
    likely = chances > 1e-9
    ends = np.array([largest_difference(fell, rose, n, 0.95) for fell, rose in outcomes_there_are[likely]])
    missed = chances[likely][ends < down - up].sum() + chances[~likely].sum()
    assert missed <= 0.057


def test_the_largest_loss_knows_questions_about_one_image():
    lost = np.repeat([1] * 4 + [0] * 16, 10)
    alone = largest_loss(outcomes(np.ones(200)), outcomes(1 - lost), 0.95)
    together = largest_loss(outcomes(np.ones(200), 10), outcomes(1 - lost, 10), 0.95)
    assert alone.loss == together.loss == 20
    assert together.largest - 20 > 2 * (alone.largest - 20)


@pytest.mark.parametrize(("before", "after", "bound"), [([1] * 50, [1] * 50, 1.0), ([1] * 100, [0] + [1] * 99, 2.5)])
def test_as_many_questions_as_are_said_to_be_needed_are_enough(before, after, bound):
    found = largest_loss(outcomes(before), outcomes(after), 0.95)
    assert found.largest > bound
    needed = questions_needed(found, bound)
    assert str(needed).rstrip("0") == str(needed)[:2].rstrip("0")
    times = needed / found.n
    assert 100 * largest_difference(found.fell * times, found.rose * times, needed, 0.95) <= bound
    fewer = 0.9 * needed
    times = fewer / found.n
    assert 100 * largest_difference(found.fell * times, found.rose * times, fewer, 0.95) > bound


def test_no_number_of_questions_helps_where_more_is_lost_than_allowed():
    found = largest_loss(outcomes([1] * 50), outcomes([0] * 5 + [1] * 45), 0.95)
    assert questions_needed(found, 10) is None
    assert questions_needed(found, 5) is None


@given(st.integers(1, 400), st.data())
def test_the_largest_loss_lies_above_the_loss_and_falls_with_the_confidence(n, data):
    fell = data.draw(st.integers(0, n))
    rose = data.draw(st.integers(0, n - fell))
    ends = [largest_difference(fell, rose, n, confidence) for confidence in (0.8, 0.95, 0.99)]
    assert ends == sorted(ends)
    assert (fell - rose) / n <= ends[0] <= ends[-1] <= 1 + 1e-9
