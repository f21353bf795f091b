"""PB-LLM against its algorithm in double precision, one row and weight after another."""

import math

import numpy as np
import pytest
import torch

from bivlm.compression.layer import pack_layer
from bivlm.methods import method
from bivlm.numerics.weight_statistics import LayerStatistics
from bivlm.packing import unpack
from tests import literal_binary as literal

METHOD = method("pb_llm")


def compress(weight, **settings):
    chosen = METHOD.Settings.model_validate({"method": "pb_llm"} | settings)
    plan = METHOD.plan(LayerStatistics.measure(weight, METHOD.tail_share(chosen)), chosen)
    packed, record = pack_layer(weight, plan)
    return unpack(packed).double().numpy(), record


def literal_layer(weight, share):
    count = round(share * weight.size)
    ranked = sorted(range(weight.size), key=lambda place: -abs(weight.flat[place]))
    salient = np.zeros(weight.shape, bool)
    salient.flat[ranked[:count]] = True
    rebuilt = np.zeros_like(weight)
    for row, weights in enumerate(weight):
        rest = weights[~salient[row]]
        scale = literal.eleven_bits(np.abs(rest).mean() if len(rest) else 0.0)
        rebuilt[row] = np.where(weights < 0, -scale, scale)
        if salient[row].any():
            few = weights[salient[row]]
            zero, step = literal.eleven_bits(few.min()), literal.eleven_bits((few.max() - few.min()) / 255)
            levels = np.clip(np.round((few - zero) / (step or 1)), 0, 255)
            rebuilt[row, salient[row]] = zero + levels * step
    return rebuilt, salient


@pytest.mark.parametrize("share", [0.0, 0.01, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("shape", [(12, 40), (1, 33), (60, 7)])
def test_the_rebuilt_weight_is_the_literal_algorithms(shape, share):
    weight = literal.trained_like(*shape, seed=3)
    rebuilt, record = compress(weight, share=share)
    expected, salient = literal_layer(weight.double().numpy(), share)
    # One step of 255 where a weight lies half-way between two levels.
    assert np.allclose(rebuilt, expected, rtol=1e-6, atol=1e-8 + salient * np.ptp(weight.numpy()) / 250)
    assert np.isclose(rebuilt, expected, rtol=1e-6).mean() > 0.99
    assert record.figures["salient_weights"] == salient.sum()


def test_stored_bits_are_those_of_the_paper_and_of_the_positions():
    """1.7 bits per weight are the paper's; positions at their entropy add 0.47 to 0.5, a bitmap would add 1."""
    weight = literal.trained_like(1024, 1024, seed=0).to(torch.bfloat16)
    _, record = compress(weight)
    assert record.bits.nominal == pytest.approx(1.7, abs=1e-5)
    assert record.bits.stored == pytest.approx(1.7 + 0.48 + 48 / 1024, abs=0.04)
    assert record.bits.nominal < record.bits.entropy <= record.bits.stored


def test_salient_weights_are_nearly_kept():
    weight = literal.trained_like(64, 128, seed=5)
    rebuilt, record = compress(weight)
    _, salient = literal_layer(weight.double().numpy(), 0.1)
    left = (weight.double().numpy() - rebuilt)[salient]
    assert np.square(left).sum() < 1e-4 * np.square(weight.numpy()[salient]).sum()
    _, signs = compress(weight, share=0.0)
    assert record.error < 0.6 * signs.error


@pytest.mark.parametrize("share", [0.0, 0.1, 0.7, 1.0])
@pytest.mark.parametrize(("what", "weight", "largest_error"), literal.DEGENERATE)
def test_degenerate_layers_have_a_defined_result(what, weight, largest_error, share):
    rebuilt, record = compress(weight.to(torch.bfloat16), share=share)
    assert np.isfinite(rebuilt).all()
    assert math.isfinite(record.bits.entropy)
    assert record.error <= (largest_error if share else 1.0)


def test_it_needs_weights_alone():
    assert METHOD.needs(METHOD.Settings(method="pb_llm")) == {"weights"}


@pytest.mark.parametrize("changes", [{"share": 1.1}, {"share": math.nan}, {"share": "0.1"}, {"bits": 4}])
def test_settings_out_of_bounds_are_refused(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        METHOD.Settings.model_validate({"method": "pb_llm"} | changes)
