"""Paired losses against simulation, published figures and brute force."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bivlm.errors import InputError
from bivlm.evaluation.paired import loss_between, mcnemar


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
