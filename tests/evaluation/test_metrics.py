"""Figures of a set against hand-made tables and an independent bootstrap."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from bivlm.evaluation.metrics import bootstrap_interval, category_accuracies, mme_metrics


def _outcomes(*rows):
    return pd.DataFrame(rows, columns=["category", "image_id", "score"])


def test_mme_adds_right_questions_and_right_images_over_the_categories():
    outcomes = _outcomes(
        ("count", "1", 1.0), ("count", "1", 1.0), ("count", "2", 1.0), ("count", "2", 0.0),
        ("color", "3", 0.0), ("color", "3", 0.0),
    )  # fmt: skip
    assert mme_metrics(outcomes) == {
        "mme_score": 75.0 + 50.0 + 0.0 + 0.0,
        "mme_max": 400.0,
        "color/acc": 0.0,
        "color/acc_plus": 0.0,
        "count/acc": 75.0,
        "count/acc_plus": 50.0,
    }


def test_an_image_cut_by_a_limit_does_not_count_as_right_on_both_questions():
    metrics = mme_metrics(_outcomes(("count", "1", 1.0), ("count", "1", 0.0), ("count", "2", 1.0)))
    assert metrics["count/acc_plus"] == 0.0
    assert metrics["count/acc"] == pytest.approx(200 / 3)


def test_an_image_may_be_asked_about_in_two_categories():
    metrics = mme_metrics(_outcomes(("a", "1", 1.0), ("a", "1", 1.0), ("b", "1", 0.0), ("b", "1", 1.0)))
    assert (metrics["a/acc_plus"], metrics["b/acc_plus"]) == (100.0, 0.0)


def test_questions_without_a_category_are_not_listed():
    assert category_accuracies(_outcomes(("", "1", 1.0), ("hard", "2", 0.5))) == {"hard/acc": 50.0}


def test_with_one_question_an_image_the_interval_is_the_ordinary_bootstrap():
    scores = (np.random.default_rng(5).random(400) < 0.8).astype(float)
    ours = bootstrap_interval(scores, [str(i) for i in range(400)])
    theirs = stats.bootstrap((100 * scores,), np.mean, n_resamples=4_000, method="percentile", rng=1)
    assert ours == pytest.approx(tuple(theirs.confidence_interval), abs=0.6)


def test_questions_about_one_image_are_drawn_together():
    scores = (np.random.default_rng(6).random(300) < 0.7).astype(float)
    images = [str(i) for i in range(300)]
    # A second question that is always answered alike tells nothing new.
    twice = bootstrap_interval(np.repeat(scores, 2), np.repeat(images, 2))
    assert twice == pytest.approx(bootstrap_interval(scores, images))


def test_two_questions_of_which_exactly_one_is_right_leave_no_doubt():
    assert bootstrap_interval([1.0, 0.0] * 50, np.repeat(range(50), 2)) == (50.0, 50.0)


def test_the_interval_is_the_same_every_time_and_for_every_seed_its_own():
    scores, images = np.random.default_rng(7).random(40), range(40)
    assert bootstrap_interval(scores, images) == bootstrap_interval(scores, images)
    assert bootstrap_interval(scores, images) != bootstrap_interval(scores, images, seed=1)


def test_many_images_do_not_take_memory_for_every_resample():
    low, high = bootstrap_interval(np.tile([0.0, 1.0], 30_000), range(60_000), resamples=100)
    assert 49 < low < 50 < high < 51
