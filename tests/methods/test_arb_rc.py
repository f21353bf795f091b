"""ARB-LLM_RC against its algorithm in double precision, one row, column and candidate after another."""

import math
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch

from bivlm.methods import method
from bivlm.methods.arb_rc import alternate, alternate_twice
from tests import literal_binary as literal

METHOD = method("arb_rc")
compress = partial(literal.compress, "arb_rc")


def squared_error_of_signs(columns, order):
    """What ``scale * sign`` of every row leaves, applied `order` times."""
    total = 0.0
    for left in columns:
        for _ in range(order):
            scale = np.mean(np.abs(left)) if len(left) else 0.0
            left = left - np.where(left < 0, -scale, scale)
        total += (left**2).sum()
    return total


def squared_error_of_groups(columns, boundary):
    small = np.abs(columns) <= boundary
    return sum(
        squared_error_of_signs([weights[group[row]]], 1)
        for group in (small, ~small)
        for row, weights in enumerate(columns)
    )


def start(columns, inside):
    """Row scales, then column scales, as means of what they multiply."""
    magnitude = np.abs(columns)
    rows = [magnitude[m, inside[m]].mean() if inside[m].any() else 0.0 for m in range(len(columns))]
    ratios = [
        [magnitude[m, n] / rows[m] for m in range(len(columns)) if inside[m, n] and rows[m] > 0]
        for n in range(columns.shape[1])
    ]
    return np.array(rows), np.array([np.mean(ratio) if ratio else 0.0 for ratio in ratios])


def refine(target, signs, inside, rows, columns):
    """One turn: the row scales that are best for the column scales, then the other way round."""
    rows, columns = rows.copy(), columns.copy()
    for m in range(len(rows)):
        below = sum(columns[n] ** 2 for n in range(len(columns)) if inside[m, n])
        if below:
            rows[m] = sum(target[m, n] * signs[m, n] * columns[n] for n in range(len(columns)) if inside[m, n]) / below
    for n in range(len(columns)):
        below = sum(rows[m] ** 2 for m in range(len(rows)) if inside[m, n])
        if below:
            columns[n] = sum(target[m, n] * signs[m, n] * rows[m] for m in range(len(rows)) if inside[m, n]) / below
    return rows, columns


def sign(values):
    return np.where(values < 0, -1.0, 1.0)


def literal_group(columns, inside, iterations):
    rows, scales = start(columns, inside)
    for _ in range(iterations):
        rows, scales = refine(columns, sign(columns), inside, rows, scales)
    return literal.eleven_bits(rows)[:, None] * literal.eleven_bits(scales) * sign(columns) * inside


def literal_twice(columns, iterations):
    everywhere = np.ones_like(columns, bool)
    pairs, signs = [start(columns, everywhere)], [sign(columns)]
    left = columns - signs[0] * np.outer(*pairs[0])
    pairs.append(start(left, everywhere))
    signs.append(sign(left))
    for _ in range(iterations):
        for this, other in ((0, 1), (1, 0)):
            target = columns - signs[other] * np.outer(*pairs[other])
            pairs[this] = refine(target, signs[this], everywhere, *pairs[this])
        first, second = np.outer(*pairs[0]), np.outer(*pairs[1])
        for place, weight in np.ndenumerate(columns):
            choices = [(s, t) for s in (1, -1) for t in (1, -1)]
            best = min(choices, key=lambda st: abs(weight - st[0] * first[place] - st[1] * second[place]))
            signs[0][place], signs[1][place] = best
    stored = [np.outer(*(literal.eleven_bits(scale) for scale in pair)) for pair in pairs]
    return signs[0] * stored[0] + signs[1] * stored[1]


def literal_block(columns, diagonal, most, iterations):
    order = np.argsort(-(columns**2 / diagonal**2).sum(0))
    errors = [
        squared_error_of_signs(columns[:, order[:count]], 2) + squared_error_of_signs(columns[:, order[count:]], 1)
        for count in range(1, min(most, len(order)) + 1)
    ]
    count = 1 + int(np.argmin(errors))
    salient, rest = order[:count], order[count:]
    ordinary = columns[:, rest]
    boundaries = np.quantile(np.abs(ordinary), np.linspace(0.1, 0.9, 81)) if len(rest) else [0.0]
    boundary = min(boundaries, key=lambda value: squared_error_of_groups(ordinary, value))
    small = np.abs(ordinary) <= boundary
    rebuilt = np.zeros_like(columns)
    rebuilt[:, rest] = literal_group(ordinary, small, iterations) + literal_group(ordinary, ~small, iterations)
    rebuilt[:, salient] = literal_twice(columns[:, salient], iterations)
    return rebuilt


@pytest.mark.parametrize(
    ("rows", "columns", "block", "most", "iterations"), [(12, 40, 16, 5, 15), (7, 33, 33, 12, 3), (20, 24, 8, 49, 0)]
)
def test_the_rebuilt_weight_is_the_literal_algorithms(rows, columns, block, most, iterations):
    weight = literal.trained_like(rows, columns, seed=3)
    moment = literal.correlated_moment(columns, seed=4)
    rebuilt, _ = compress(weight, moment, block=block, salient_columns=most, iterations=iterations)
    changed = literal.damped(moment, 0.01)
    diagonal = literal.factor_diagonal(changed)

    def quantize(begin, block_columns):
        return literal_block(block_columns, diagonal[begin : begin + block_columns.shape[1]], most, iterations)

    assert literal.agree(rebuilt, literal.quantize_blocks(weight.double().numpy(), changed, block, quantize))


def group_error(columns, inside, iterations):
    rows, scales = alternate(columns, inside, iterations)
    product = scales[:, None] * rows * torch.where(columns < 0, -1.0, 1.0)
    return float(((columns - product) * inside).double().square().sum())


def twice_error(columns, iterations):
    rows, scales, positive = alternate_twice(columns, iterations)
    products = scales[:, :, None] * rows[:, None] * torch.where(positive, 1.0, -1.0)
    return float((columns - products.sum(0)).double().square().sum())


@pytest.mark.parametrize("seed", range(5))
def test_no_turn_raises_the_squared_error(seed):
    columns = literal.trained_like(60, 24, seed).T.contiguous()
    inside = columns.abs() <= columns.abs().median()
    for errors in (
        [group_error(columns, inside, iterations) for iterations in range(16)],
        [group_error(columns, ~inside, iterations) for iterations in range(16)],
        [twice_error(columns, iterations) for iterations in range(16)],
    ):
        assert all(after <= before * (1 + 1e-5) for before, after in pairwise(errors))
        assert errors[-1] < errors[0]


def test_stored_bits_are_two_and_the_scales_of_rows_and_columns():
    """2 + 64 / block + 32 / M + the bitmap; the paper's count leaves all but signs out."""
    weight = literal.trained_like(4096, 256, seed=0).to(torch.bfloat16)
    _, record = compress(weight, np.zeros((256, 256)))
    assert record.bits.stored == pytest.approx(2 + 64 / 128 + 33 / 4096, abs=1e-3)
    assert record.bits.stored == pytest.approx(2.51, abs=0.005)
    assert record.bits.nominal == 1 + record.figures["salient_columns"] / 256
    assert record.bits.nominal < record.bits.entropy <= record.bits.stored


def test_turns_lower_the_error_of_the_weight():
    weight, nothing = literal.trained_like(64, 256, seed=5), np.zeros((256, 256))
    errors = [compress(weight, nothing, iterations=iterations)[1].error for iterations in (0, 1, 15)]
    assert errors[2] < errors[1] < errors[0]


def test_output_error_is_well_below_that_of_signs():
    weight, moment = literal.trained_like(64, 128, seed=5), literal.correlated_moment(128, seed=6)
    _, record = compress(weight, moment)
    assert record.output_error < 0.6 * literal.sign_error(weight.double().numpy(), moment)


@pytest.mark.parametrize("seen", ["inputs", "no token", "dead channels", "few tokens"])
@pytest.mark.parametrize(("what", "weight", "largest_error"), literal.DEGENERATE)
def test_degenerate_layers_have_a_defined_result(what, weight, largest_error, seen):
    weight = weight.to(torch.bfloat16)
    rebuilt, record = compress(weight, literal.moment_seen(weight.shape[1], seen), block=16)
    assert np.isfinite(rebuilt).all()
    assert math.isfinite(record.bits.entropy)
    assert set(record.figures) == {"damping", "dead_channels", "tokens", "salient_columns"}
    assert record.error < 1.5
    if seen == "no token":
        assert record.error <= largest_error


@pytest.mark.parametrize("changes", [{"block": 0}, {"damping": 1.5}, {"iterations": -1}, {"share": 0.1}])
def test_settings_out_of_bounds_are_refused(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        METHOD.Settings.model_validate({"method": "arb_rc"} | changes)
