"""BiLLM against its algorithm in double precision, one row, column and candidate after another."""

import math
from functools import partial

import numpy as np
import pytest
import torch

from bivlm.errors import InputError
from bivlm.methods import method
from bivlm.numerics.weight_statistics import LayerStatistics
from tests import literal_binary as literal

METHOD = method("billm")
compress = partial(literal.compress, "billm")


def binary(values):
    """Mean and scale of a list of weights and what ``mean + scale * sign`` leaves of them."""
    mean = np.mean(values) if len(values) else 0.0
    scale = np.mean(np.abs(values - mean)) if len(values) else 0.0
    return mean, scale, values - mean - np.where(values < mean, -scale, scale)


def once(columns):
    """What one binarization of every row leaves."""
    return np.array([binary(row)[2] for row in columns])


def twice(columns):
    return once(once(columns))


def rows_in_two_groups(columns, boundary):
    left = np.zeros_like(columns)
    for row, weights in enumerate(columns):
        for group in (np.abs(weights) <= boundary, np.abs(weights) > boundary):
            left[row, group] = binary(weights[group])[2]
    return left


def literal_block(columns, diagonal, most):
    """The rebuilt block (M, B): numbers as stored are applied once all choices are made."""
    order = np.argsort(-(columns**2 / diagonal**2).sum(0))
    errors = []
    for count in range(1, min(most, len(order)) + 1):
        salient, rest = columns[:, order[:count]], columns[:, order[count:]]
        errors.append((twice(salient) ** 2).sum() + (once(rest) ** 2).sum())
    count = 1 + int(np.argmin(errors))
    salient, rest = order[:count], order[count:]
    ordinary = columns[:, rest]
    boundaries = np.quantile(np.abs(ordinary), np.linspace(0.1, 0.9, 81)) if len(rest) else [0.0]
    boundary = min(boundaries, key=lambda value: (rows_in_two_groups(ordinary, value) ** 2).sum())

    rebuilt = np.zeros_like(columns)
    for row, weights in enumerate(columns):
        for group in (np.abs(weights) <= boundary, np.abs(weights) > boundary):
            inside = rest[group[rest]]
            mean, scale, _ = binary(weights[inside])
            signs = np.where(weights[inside] < mean, -1, 1)
            rebuilt[row, inside] = literal.eleven_bits(mean) + signs * literal.eleven_bits(scale)
        mean, first, left = binary(weights[salient])
        other_mean, second, _ = binary(left)
        signs, other = np.where(weights[salient] < mean, -1, 1), np.where(left < other_mean, -1, 1)
        numbers = [literal.eleven_bits(value) for value in (mean + other_mean, first, second)]
        rebuilt[row, salient] = numbers[0] + signs * numbers[1] + other * numbers[2]
    return rebuilt, count


@pytest.mark.parametrize(
    ("rows", "columns", "block", "most", "damping"),
    [(12, 40, 16, 5, 0.01), (7, 33, 33, 12, 0.1), (20, 24, 8, 49, 0.01)],
)
def test_the_rebuilt_weight_is_the_literal_algorithms(rows, columns, block, most, damping):
    weight = literal.trained_like(rows, columns, seed=3)
    moment = literal.correlated_moment(columns, seed=4)
    rebuilt, record = compress(weight, moment, block=block, salient_columns=most, damping=damping)
    changed = literal.damped(moment, damping)
    diagonal, counts = literal.factor_diagonal(changed), []

    def quantize(begin, block_columns):
        out, count = literal_block(block_columns, diagonal[begin : begin + block_columns.shape[1]], most)
        counts.append(count)
        return out

    expected = literal.quantize_blocks(weight.double().numpy(), changed, block, quantize)
    assert record.figures["salient_columns"] == sum(counts)
    assert literal.agree(rebuilt, expected)


def test_stored_bits_are_two_and_the_numbers_of_rows_and_blocks():
    """2 + 112 / block + the bitmap, whatever is salient; the paper's count leaves all but signs out."""
    weight = literal.trained_like(4096, 256, seed=0).to(torch.bfloat16)
    _, record = compress(weight, np.zeros((256, 256)))
    assert 2.8 < record.bits.stored < 3.2
    assert record.bits.stored == pytest.approx(2 + 112 / 128 + 1 / 4096, abs=1e-3)
    assert record.bits.nominal == 1 + record.figures["salient_columns"] / 256
    assert record.bits.nominal < record.bits.entropy <= record.bits.stored


def test_output_error_is_well_below_that_of_signs():
    weight, moment = literal.trained_like(64, 128, seed=5), literal.correlated_moment(128, seed=6)
    rebuilt, record = compress(weight, moment)
    signs = literal.sign_error(weight.double().numpy(), moment)
    assert record.output_error < 0.6 * signs
    assert record.output_error == pytest.approx(
        literal.output_error(weight.double().numpy(), rebuilt, moment), rel=1e-2
    )


def test_feedback_lowers_the_output_error():
    weight, moment = literal.trained_like(64, 256, seed=5), literal.correlated_moment(256, seed=6)
    _, fed = compress(weight, moment, block=64)
    without, _ = compress(weight, np.diag(np.diag(moment)), block=64)
    assert fed.output_error < 0.7 * literal.output_error(weight.double().numpy(), without, moment)


@pytest.mark.parametrize("seen", ["inputs", "no token", "dead channels", "few tokens"])
@pytest.mark.parametrize(("what", "weight", "largest_error"), literal.DEGENERATE)
def test_degenerate_layers_have_a_defined_result(what, weight, largest_error, seen):
    weight = weight.to(torch.bfloat16)
    rebuilt, record = compress(weight, literal.moment_seen(weight.shape[1], seen), block=16)
    assert np.isfinite(rebuilt).all()
    assert math.isfinite(record.bits.entropy)
    assert set(record.figures) == {"damping", "dead_channels", "tokens", "salient_columns"}
    if seen == "no token":
        assert record.error <= largest_error
        assert record.figures["dead_channels"] == weight.shape[1]
    assert record.error < 1.5


def test_no_salient_columns_are_a_choice():
    weight, moment = literal.trained_like(16, 64, seed=5), literal.correlated_moment(64, seed=6)
    _, record = compress(weight, moment, salient_columns=0)
    assert record.figures["salient_columns"] == 0
    assert record.bits.nominal == 1


def test_bytes_are_the_same_every_time():
    weight, moment = literal.trained_like(40, 96, seed=5), literal.correlated_moment(96, seed=6)
    assert np.array_equal(compress(weight, moment)[0], compress(weight.clone(), moment)[0])


def test_a_layer_without_inputs_is_refused():
    chosen = METHOD.Settings(method="billm")
    weight = literal.trained_like(4, 8, seed=0)
    plan = METHOD.plan(LayerStatistics.measure(weight, 0), chosen)
    with pytest.raises(InputError, match="'billm' needs the second moment"):
        METHOD.quantize(weight, plan)
    assert METHOD.needs(chosen) == {"weights", "inputs"}


@pytest.mark.parametrize("changes", [{"block": 0}, {"damping": -0.1}, {"salient_columns": -1}, {"share": 0.1}])
def test_settings_out_of_bounds_are_refused(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        METHOD.Settings.model_validate({"method": "billm"} | changes)
