"""Weights at the ends of what their dtype holds: packed as finite weights, or refused with the layer and the method."""

import math

import pytest
import torch

from bivlm.compression.layer import measure, pack_layer
from bivlm.errors import InputError
from bivlm.methods import method, methods
from bivlm.numerics.input_statistics import SiteStatistics
from bivlm.numerics.uniform_grid import round_to_nearest
from bivlm.numerics.weight_statistics import LayerStatistics
from bivlm.packing import grouped, open_packed, unpack

ROWS, COLUMNS = 16, 64
LAYER = "tower.fc1"
SETTINGS = [
    {"method": "rtn", "bits": 2},
    {"method": "rtn", "bits": 8, "group_size": 0},
    {"method": "gptq", "bits": 2},
    {"method": "gptq", "bits": 4},
    {"method": "awq", "bits": 4},
    {"method": "pb_llm"},
    {"method": "pb_llm", "share": 0.0},
    {"method": "billm", "block": 16},
    {"method": "arb_rc"},
    {"method": "hbllm"},
    {"method": "hbllm", "pairing": "greedy", "fill": "neighbours"},
    {"method": "trellis", "feedback": "none"},
    {"method": "trellis", "rate": 1.25},
    {"method": "trellis", "rate": 0.5, "feedback": "both", "rotate": "inputs"},
    {"method": "bivlm", "groups": 2, "p_max": 0.0},
    {"method": "bivlm", "groups": 3, "p_max": 0.05},
    {"method": "bivlm", "groups": 2, "p_max": 0.05, "saliency": "gradient"},
    {"method": "bivlm", "groups": 2, "p_max": 0.05, "feedback": True, "salient_bits": 3},
]


def drawn(seed=0):
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def up_to(largest, dtype=torch.float32):
    return (drawn() / drawn().abs().max() * largest).to(dtype)


def one_row(largest):
    weight = drawn() * 1e-3
    weight[3] *= largest / weight[3].abs().max()
    return weight.to(torch.float32)


HUGE = {
    "float32 up to 3.4e38": up_to(3.4e38),
    "float32 3.4e38 and -3.4e38": drawn().sign().mul(3.4e38).to(torch.float32),
    "bfloat16 up to 3.38e38": up_to(3.38e38, torch.bfloat16),
    "float16 up to 65504": up_to(65504, torch.float16),
    "float16 65504 and -65504": drawn().sign().mul(65504).to(torch.float16),
    "one row of 3.4e38": one_row(3.4e38),
}
ORDINARY = {
    "1e-45": drawn().sign().mul(1e-45).to(torch.float32),
    "up to 1e-42": up_to(1e-42),
    "up to 1e-38": up_to(1e-38),
    "float16 6e-8": drawn().sign().mul(6e-8).to(torch.float16),
    "zeros": torch.zeros(ROWS, COLUMNS),
    "one row of 1e20": one_row(1e20),
    "up to 1e36": up_to(1e36),
}


def packed(settings, weight):
    chosen = method(settings["method"])
    settings = chosen.Settings.model_validate(settings)
    x = torch.randn(300, COLUMNS, generator=torch.Generator().manual_seed(1))
    inputs = SiteStatistics(
        x.T @ x / 300, x.mean(0), x.abs().mean(0), {"text": 300}, torch.ones(ROWS, COLUMNS), torch.eye(ROWS)
    )
    plan = chosen.plan(LayerStatistics.measure(weight, chosen.tail_share(settings), LAYER), settings)
    return pack_layer(weight, plan, LAYER, inputs)


def test_every_method_is_tried():
    assert {settings["method"] for settings in SETTINGS} == set(methods())


@pytest.mark.parametrize("weight", HUGE.values(), ids=HUGE)
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_largest_weights_are_finite_when_rebuilt_or_refused(settings, weight):
    try:
        tensor, record = packed(settings, weight)
    except InputError as error:
        assert str(error).startswith(f"{LAYER}, packed by {settings['method']}: ")
        return
    assert unpack(tensor).isfinite().all()
    assert math.isfinite(record.error)


@pytest.mark.parametrize("weight", ORDINARY.values(), ids=ORDINARY)
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_other_weights_of_any_size_are_packed(settings, weight):
    tensor, record = packed(settings, weight)
    assert unpack(tensor).isfinite().all()
    assert math.isfinite(record.error) and math.isfinite(record.bits.entropy)


def test_hbllm_on_the_largest_weights_is_refused():
    with pytest.raises(InputError, match=f"{LAYER}, packed by hbllm: .*expected finite weights"):
        packed({"method": "hbllm"}, HUGE["float32 up to 3.4e38"])


def test_a_number_that_only_overflows_the_dtype_counts_as_not_finite():
    weight = up_to(3000.0)
    tensor = grouped.pack(round_to_nearest(weight, 8, 64), torch.float16)
    codec, header = open_packed(tensor)
    numbers = codec.tunable(tensor, header).parameters
    assert unpack(codec.retuned(tensor, header, {"scales": 20 * numbers["scales"]})).isfinite().all()
    moved = codec.retuned(tensor, header, {"scales": 30 * numbers["scales"]})  # 90,000: finite in float32
    with pytest.raises(InputError, match=r"tower.fc1, finished: .*infinite in torch.float16, expected finite weights"):
        measure(weight.to(torch.float16), moved, f"{LAYER}, finished")


@pytest.mark.parametrize("largest", [1e-45, 1e-43, 1e-41])
def test_weights_below_every_normal_number_keep_their_size(largest):
    """A sign and a scale hold two opposite values exactly."""
    weight = drawn().sign().mul(largest).to(torch.float32)
    tensor, record = packed({"method": "bivlm", "groups": 1, "p_max": 0.0}, weight)
    assert torch.equal(unpack(tensor), weight)
    assert record.error == 0
