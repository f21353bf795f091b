"""Error feedback against the closed form: the best completion of a weight whose first columns are fixed."""

import pytest
import torch

from bivlm.numerics.error_feedback import feed_back, feed_back_columns, inverse_factor


def inputs(tokens, channels, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(channels, channels, generator=generator, dtype=torch.float64) / channels**0.5
    return torch.randn(tokens, channels, generator=generator, dtype=torch.float64) @ mixing


def weights(rows, channels, seed=1):
    return torch.randn(rows, channels, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def least_squares_completion(weight, rebuilt, fixed, moment):
    """Columns from `fixed` on that minimise the output error where those before are `rebuilt`, by normal equations."""
    error = weight[:, :fixed] - rebuilt[:, :fixed]
    return weight[:, fixed:] + error @ moment[:fixed, fixed:] @ torch.linalg.inv(moment[fixed:, fixed:])


@pytest.mark.parametrize("damping", [0.0, 0.01, 0.1])
def test_factor_of_the_inverse(damping):
    moment = inputs(200, 24).T @ inputs(200, 24)
    factor = inverse_factor(moment.float(), damping)
    damped = moment + damping * moment.diagonal().mean() * torch.eye(24)
    upper = factor.upper_NN.double()
    assert torch.equal(upper, upper.triu())
    # Rounding to float32 changes an inverse by eps times the condition number, of its norm and not of each entry.
    inverse = torch.linalg.inv(damped)
    error = torch.linalg.norm(upper.T @ upper - inverse) / torch.linalg.norm(inverse)
    assert error < torch.finfo(torch.float32).eps * torch.linalg.cond(damped)
    assert (factor.damping, factor.dead_channels) == (damping, 0)


@pytest.mark.parametrize("block", [1, 5, 8, 24])
def test_every_block_sees_the_best_completion_of_what_was_fixed_before(block):
    x = inputs(300, 24)
    moment, weight = x.T @ x / 300, weights(7, 24)
    upper = inverse_factor(moment.float(), 0.0).upper_NN
    seen = {}

    def coarse(begin, columns_BM):
        seen[begin] = columns_BM.double().T.clone()
        return columns_BM.round()

    rebuilt = feed_back(weight, upper, coarse, block).double()
    for begin, columns in seen.items():
        expected = least_squares_completion(weight, rebuilt, begin, moment)[:, : columns.shape[1]]
        assert torch.allclose(columns, expected, atol=2e-4)


@pytest.mark.parametrize("block", [1, 7, 24, 40])
def test_columns_within_blocks_are_fed_back_as_columns_alone(block):
    x = inputs(300, 40)
    weight = weights(5, 40)
    upper = inverse_factor((x.T @ x / 300).float(), 0.01).upper_NN

    def columns(begin, block_BM):
        end = begin + len(block_BM)
        return feed_back_columns(block_BM, upper[begin:end, begin:end], lambda _, column: column.round())

    one_by_one = feed_back(weight, upper, lambda _, column: column.round(), block=1)
    assert torch.allclose(feed_back(weight, upper, columns, block), one_by_one, atol=1e-4)


def test_feedback_lowers_the_output_error():
    x = inputs(500, 64)
    moment, weight = (x.T @ x / 500).float(), weights(32, 64).float()
    rebuilt = feed_back(weight, inverse_factor(moment).upper_NN, lambda _, columns: columns.round(), block=1)

    def output_error(other):
        return float(torch.einsum("mi,ij,mj->", other - weight, moment, other - weight))

    assert output_error(rebuilt) < 0.6 * output_error(weight.round())


def test_fewer_tokens_than_channels_raise_the_damping_and_say_so():
    x = inputs(10, 64).float()
    factor = inverse_factor(x.T @ x, 0.0)
    assert 0 < factor.damping <= 1
    assert factor.upper_NN.isfinite().all()


def test_dead_channels_neither_take_nor_give_errors():
    x = inputs(200, 16).float()
    x[:, [3, 9]] = 0
    factor = inverse_factor(x.T @ x)
    assert factor.dead_channels == 2
    off_diagonal = factor.upper_NN - factor.upper_NN.diagonal().diag()
    assert off_diagonal[[3, 9]].abs().max() == 0
    assert off_diagonal[:, [3, 9]].abs().max() == 0


def test_a_layer_that_saw_no_token_is_quantized_by_its_weights_alone():
    factor = inverse_factor(torch.zeros(8, 8))
    weight = weights(4, 8).float()
    assert factor.dead_channels == 8
    assert torch.equal(feed_back(weight, factor.upper_NN, lambda _, columns: columns.round()), weight.round())


def test_what_is_no_second_moment_is_refused():
    with pytest.raises(ArithmeticError, match="no Cholesky factor"):
        inverse_factor(torch.tensor([[1.0, 5.0], [5.0, 1.0]]))


def test_the_factor_of_many_channels_is_inverted_as_exactly():
    """Enough channels for an inverse by halves, and a number of them that does not halve evenly."""
    x = inputs(3000, 601)
    moment = x.T @ x / 3000
    upper = inverse_factor(moment.float(), 0.01).upper_NN.double()
    damped = moment + 0.01 * moment.diagonal().mean() * torch.eye(601)
    assert torch.equal(upper, upper.triu())
    assert torch.allclose(upper @ damped @ upper.T, torch.eye(601, dtype=torch.float64), atol=2e-4)


@pytest.mark.parametrize("turned", [False, True])
def test_weight_and_columns_are_left_as_they_were(turned):
    x = inputs(100, 40)
    weight = weights(40, 40).float().T if turned else weights(40, 40).float()
    before, seen = weight.clone(), []
    upper = inverse_factor((x.T @ x).float()).upper_NN

    def columns(begin, block_BM):
        given, end = block_BM.clone(), begin + len(block_BM)
        rebuilt = feed_back_columns(block_BM, upper[begin:end, begin:end], lambda _, column: column.round())
        seen.append(torch.equal(block_BM, given))
        return rebuilt

    feed_back(weight, upper, columns, 16)
    assert torch.equal(weight, before)
    assert seen == [True] * 3
