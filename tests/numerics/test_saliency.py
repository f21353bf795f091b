"""Scores against what they stand for, worked out weight by weight in double precision."""

import numpy as np
import pytest
import torch

from bivlm.numerics.input_statistics import SiteStatistics
from bivlm.numerics.saliency import METRICS, most_salient, scores

TOKENS, ROWS, COLUMNS = 60, 3, 8
DAMPING = 0.01


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def x():
    return normal(0, TOKENS, COLUMNS) @ normal(1, COLUMNS, COLUMNS)


@pytest.fixture
def weight():
    return normal(2, ROWS, COLUMNS)


def site(x, gradient=None):
    x = x.float()
    return SiteStatistics(x.T @ x / max(len(x), 1), x.mean(0), x.abs().mean(0), {"text": len(x)}, gradient)


def test_magnitude_needs_no_inputs(weight):
    assert torch.equal(scores("magnitude", weight), weight.float().abs())


def test_hessian_score_is_the_least_output_error_of_leaving_the_weight_out(x, weight):
    """Of all ways in which the later weights of the row may make up for it; those before are fixed already."""
    moment = x.T @ x / TOKENS
    moment += DAMPING * moment.diagonal().mean() * torch.eye(COLUMNS)
    expected = torch.empty_like(weight)
    for row in range(ROWS):
        for column in range(COLUMNS):
            error = torch.zeros(COLUMNS, dtype=torch.float64)
            error[column] = weight[row, column]
            later = slice(column + 1, COLUMNS)
            error[later] = -torch.linalg.solve(moment[later, later], moment[later, column]) * weight[row, column]
            expected[row, column] = error @ moment @ error
    found = scores("hessian", weight, site(x), damping=DAMPING).double()
    assert torch.allclose(found, expected, rtol=1e-4)


def test_hessian_score_divides_by_the_inverse_of_what_is_left(x, weight):
    moment = (x.T @ x / TOKENS).float().double()
    moment += DAMPING * moment.diagonal().mean() * torch.eye(COLUMNS)
    left = torch.stack([torch.linalg.inv(moment[column:, column:])[0, 0] for column in range(COLUMNS)])
    assert torch.allclose(scores("hessian", weight, site(x), damping=DAMPING).double(), weight**2 / left, rtol=1e-4)


def test_hessian_score_takes_the_damping_that_is_asked_for(x, weight):
    last = (x[:, -1] ** 2).mean()
    damped = [last + damping * (x**2).mean() for damping in (0.01, 1.0)]
    found = [scores("hessian", weight, site(x), damping=damping)[:, -1].double() for damping in (0.01, 1.0)]
    assert torch.allclose(found[0], weight[:, -1] ** 2 * damped[0], rtol=1e-4)
    assert torch.allclose(found[1], weight[:, -1] ** 2 * damped[1], rtol=1e-4)


def test_activation_score_is_the_mean_magnitude_of_the_product(x, weight):
    expected = (weight[None] * x[:, None]).abs().mean(0)
    assert torch.allclose(scores("activation", weight, site(x)).double(), expected, rtol=1e-5)


def test_gradient_score_is_the_rise_of_a_quadratic_without_the_weight(x, weight):
    """The divergence is about ``sum_t (s_t E x_t)^2``; its diagonal is what one weight alone does."""
    slopes = normal(3, TOKENS, ROWS)
    square = (slopes**2).T @ x**2
    found = scores("gradient", weight, site(x, square.float())).double()
    for row, column in ((0, 0), (1, 5), (2, 7)):
        rise = sum((slopes[t, row] * weight[row, column] * x[t, column]) ** 2 for t in range(TOKENS))
        assert float(found[row, column]) == pytest.approx(float(rise), rel=1e-4)


@pytest.mark.parametrize("metric", METRICS)
def test_where_no_token_was_seen_it_is_the_magnitude(metric, weight):
    nothing = SiteStatistics(torch.zeros(COLUMNS, COLUMNS), torch.zeros(COLUMNS), torch.zeros(COLUMNS), {"text": 0})
    assert torch.equal(scores(metric, weight, nothing), weight.float().abs())


def test_where_no_token_reaches_the_answer_the_gradient_is_the_magnitude(x, weight):
    assert torch.equal(scores("gradient", weight, site(x)), weight.float().abs())


@pytest.mark.parametrize("metric", [metric for metric in METRICS if metric != "magnitude"])
def test_what_looks_at_inputs_is_refused_without(metric, weight):
    with pytest.raises(ValueError, match=f"saliency '{metric}' needs input statistics"):
        scores(metric, weight)


@pytest.mark.parametrize("metric", METRICS)
def test_scores_are_finite_with_dead_channels_and_bfloat16_weights(metric, x, weight):
    x[:, 3] = 0
    found = scores(metric, weight.to(torch.bfloat16), site(x, torch.zeros(ROWS, COLUMNS)))
    assert (found.dtype, found.shape) == (torch.float32, (ROWS, COLUMNS))
    assert found.isfinite().all()


@pytest.mark.parametrize(
    ("values", "count", "expected"),
    [
        ([[1, 5, 3], [4, 2, 0]], 3, [1, 2, 3]),
        ([[2, 2, 2], [2, 3, 2]], 3, [0, 1, 4]),  # of equal ones the first
        ([[0, 0, 0], [0, 0, 0]], 2, [0, 1]),
        ([[1, 5, 3], [4, 2, 0]], 6, [0, 1, 2, 3, 4, 5]),
        ([[1, 5, 3], [4, 2, 0]], 0, []),
    ],
)
def test_the_most_salient_are_as_many_as_asked_for(values, count, expected):
    found = most_salient(torch.tensor(values, dtype=torch.float32), count)
    assert (found.dtype, found.tolist()) == (np.int64, expected)
