"""Bisection of the pruned share, against the truth of made-up models."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bivlm.evaluation.paired import Loss
from bivlm.pruning.redundancy import find_redundancy, verdict


def loss(value, reach, n=500):
    return Loss(n=n, loss=value, low=value - reach, high=value + reach, worse=0, better=0, p_value=1.0)


@given(st.floats(0.3, 30), st.floats(0.1, 10), st.floats(1.0, 6))
def test_the_ends_are_those_of_looking_at_every_share(tolerance, reach, power):
    calls = []

    def measure(share):
        calls.append(share)
        return loss(60 * share**power, reach)

    found = find_redundancy(measure, tolerance)
    every = {step / 100: verdict(loss(60 * (step / 100) ** power, reach), tolerance) for step in range(1, 100)}
    assert found.shown == max((s for s, v in every.items() if v == "within"), default=None)
    assert found.refuted == min((s for s, v in every.items() if v == "beyond"), default=None)
    assert len(calls) == len(set(calls)) <= 15


def test_a_sharp_edge_is_resolved_and_said_in_a_sentence():
    found = find_redundancy(lambda share: loss(0.0 if share <= 0.86 else 20.0, 0.5), 1.0)
    assert (found.shown, found.refuted, found.resolved) == (0.86, 0.87, True)
    assert found.in_words() == "86 % of the image tokens can be dropped within 1 point; 87 % cannot (500 questions)"


def test_what_the_questions_cannot_tell_is_said():
    found = find_redundancy(lambda share: loss(3 * share, 2.0), 1.0)
    assert found.shown is None
    assert not found.resolved
    assert found.in_words().startswith(
        "no share is shown to stay within 1 point: not resolvable with 500 questions (about "
    )
    found = find_redundancy(lambda share: loss(40 * share**2, 2.0), 3.0)
    assert "15 % of the image tokens can be dropped within 3 points; 36 % cannot; in between not" in found.in_words()
    found = find_redundancy(lambda share: loss(4 * share, 2.0), 3.0)
    assert "25 % of the image tokens can be dropped within 3 points; more is not resolvable" in found.in_words()


def test_how_many_questions_it_would_take():
    """An interval of +-2 points at a loss of 0 is within 1 point at four times as many questions."""
    found = find_redundancy(lambda share: loss(0.0, 2.0), 1.0)
    assert found.needed == 2000
    assert "about 2,000 would be needed" in found.in_words()


def test_no_loss_at_all_leaves_nothing_in_doubt():
    found = find_redundancy(lambda share: loss(0.0, 0.1), 1.0)
    assert (found.shown, found.refuted) == (0.99, None)
    assert found.resolved


@pytest.mark.parametrize(
    ("low", "high", "said"), [(-1, 1, "within"), (-1, 1.1, "unclear"), (1.1, 2, "beyond"), (0.9, 1.0, "within")]
)
def test_verdicts(low, high, said):
    assert verdict(Loss(100, (low + high) / 2, low, high, 0, 0, 1.0), 1.0) == said


def test_a_share_that_leaves_no_token_ends_the_range():
    found = find_redundancy(lambda share: loss(0.0, 0.1) if share < 0.94 else None, 1.0)
    assert (found.shown, found.refuted, found.resolved) == (0.93, None, True)
    assert None not in found.losses.values()
