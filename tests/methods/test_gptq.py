"""GPTQ against optimal brain quantization in double precision, which inverts the remaining Hessian at every column."""

import numpy as np
import pytest
import torch

from bivlm.compression.layer import pack_layer
from bivlm.errors import InputError
from bivlm.methods import method
from bivlm.methods.base import INPUTS
from bivlm.methods.gptq import feed_back_groups
from bivlm.numerics.error_feedback import inverse_factor
from bivlm.numerics.input_statistics import SiteStatistics
from bivlm.numerics.weight_statistics import LayerStatistics
from bivlm.packing import unpack
from bivlm.recipe.loading import parse_recipe

METHOD = method("gptq")


def activations(tokens, channels, seed=0):
    """Inputs that mostly lie in a few directions, in channels of unequal size, as in a trained model."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(channels // 8, channels, generator=generator)
    x = torch.randn(tokens, len(directions), generator=generator) @ directions / len(directions) ** 0.5
    x += 0.3 * torch.randn(tokens, channels, generator=generator)
    return x * torch.exp(0.5 * torch.randn(channels, generator=generator))


def site(x):
    return SiteStatistics(x.T @ x / max(len(x), 1), x.mean(0), x.abs().mean(0), {"text": len(x)})


def nothing_seen(channels):
    return SiteStatistics(torch.zeros(channels, channels), torch.zeros(channels), torch.zeros(channels), {"text": 0})


def gaussian(seed, shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def plan_for(weight, name="gptq", **changes):
    chosen = method(name)
    settings = chosen.Settings.model_validate({"method": name} | changes)
    return chosen.plan(LayerStatistics.measure(weight, 0), settings)


def optimal_brain_quantization(weight, moment, bits, width, damping):
    """Codes (M, N): after every column the others move to where the quadratic output error is smallest."""
    running = weight.double().numpy().copy()
    hessian = moment.double().numpy() + damping * float(moment.diagonal().mean()) * np.eye(len(moment))
    codes = np.empty(running.shape, int)
    for column in range(running.shape[1]):
        if column % width == 0:
            group = running[:, column : column + width]
            low, high = np.minimum(group.min(1), 0), np.maximum(group.max(1), 0)
            scale = ((high - low) / (2**bits - 1)).astype(np.float16).astype(np.float64)
            zero = np.round(-low / scale)
        codes[:, column] = np.clip(np.round(running[:, column] / scale) + zero, 0, 2**bits - 1)
        error = running[:, column] - (codes[:, column] - zero) * scale
        remaining = np.linalg.inv(hessian[column:, column:])
        running[:, column:] -= np.outer(error / remaining[0, 0], remaining[0])
    return codes


@pytest.mark.parametrize(("bits", "group_size"), [(2, 64), (2, 16), (3, 0), (4, 40), (2, 17)])
def test_codes_are_those_of_optimal_brain_quantization(bits, group_size):
    weight, x = gaussian(bits, (24, 160)), activations(1000, 160)
    moment = site(x).second_moment_NN
    coded = feed_back_groups(weight, inverse_factor(moment, 0.01).upper_NN, bits, group_size)
    expected = optimal_brain_quantization(weight, moment, bits, group_size or 160, 0.01)
    assert np.array_equal(coded.codes_MN.numpy(), expected)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_outputs_lose_less_than_by_rounding_to_nearest_in_the_same_bytes(bits):
    weight, inputs = gaussian(0, (256, 256), torch.bfloat16), site(activations(2000, 256))
    chosen = {"bits": bits, "group_size": 64}
    _, gptq = pack_layer(weight, plan_for(weight, **chosen), inputs=inputs)
    _, rtn = pack_layer(weight, plan_for(weight, "rtn", **chosen), inputs=inputs)
    assert gptq.output_error < 0.6 * rtn.output_error
    assert gptq.error > rtn.error
    assert gptq.nbytes == rtn.nbytes


@pytest.mark.parametrize("moment", [torch.zeros(96, 96), torch.eye(96)], ids=["no token", "uncorrelated channels"])
@pytest.mark.parametrize("group_size", [0, 32, 40])
def test_without_anything_to_feed_back_the_bytes_are_those_of_rounding_to_nearest(moment, group_size):
    weight = gaussian(1, (32, 96), torch.bfloat16)
    inputs = SiteStatistics(moment, torch.zeros(96), torch.zeros(96), {"text": 0})
    found = METHOD.quantize(weight, plan_for(weight, group_size=group_size), inputs)
    nearest = method("rtn").quantize(weight, plan_for(weight, "rtn", group_size=group_size))
    assert torch.equal(found.packed, nearest.packed)


def test_figures_say_what_the_second_moment_was_worth():
    x, weight = activations(20, 96), gaussian(2, (16, 96))
    x[:, [5, 50]] = 0
    figures = METHOD.quantize(weight, plan_for(weight, damping=0.0), site(x)).figures
    assert figures["tokens"] == 20 and figures["dead_channels"] == 2
    assert 0 < figures["damping"] <= 1
    assert METHOD.quantize(weight, plan_for(weight), site(activations(500, 96))).figures["damping"] == 0.01
    assert METHOD.quantize(weight, plan_for(weight), nothing_seen(96)).figures["dead_channels"] == 96


def test_a_dead_channel_is_rounded_to_nearest():
    x, weight = activations(500, 64), gaussian(3, (16, 64))
    x[:, 7] = 0
    packed = METHOD.quantize(weight, plan_for(weight, bits=8, group_size=0), site(x)).packed
    step = (weight.amax(1) - weight.amin(1)) / 255
    assert ((unpack(packed) - weight)[:, 7].abs() <= 0.51 * step).all()
    assert ((unpack(packed) - weight).abs() > 0.51 * step[:, None]).any()


@pytest.mark.parametrize(
    "weight",
    [
        torch.zeros(4, 40),
        torch.full((4, 40), -0.25),
        torch.cat([torch.zeros(1, 40), gaussian(1, (3, 40))]),
        torch.cat([gaussian(1, (3, 40)) * 1e-3, torch.eye(1, 40)]),
        gaussian(2, (1, 40)),
        gaussian(2, (4, 40)) * 1e-36,
        gaussian(2, (4, 40)) * 1e15,
    ],
)
@pytest.mark.parametrize("inputs", [site(activations(10, 40)), nothing_seen(40)], ids=["few tokens", "none"])
def test_degenerate_layers_have_a_defined_result(weight, inputs):
    packed, record = pack_layer(weight.to(torch.bfloat16), plan_for(weight.to(torch.bfloat16)), inputs=inputs)
    assert unpack(packed).isfinite().all()
    assert np.isfinite(record.output_error) and record.output_error < 1


def test_it_has_to_see_the_inputs_and_leaves_the_weight_alone():
    weight = gaussian(5, (16, 64))
    before = weight.clone()
    METHOD.quantize(weight, plan_for(weight), site(activations(100, 64)))
    assert torch.equal(weight, before)
    assert METHOD.needs(METHOD.Settings(method="gptq")) == INPUTS


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 1}, r"components\.language\.bits: .*2, 3, 4 or 8, found 1"),
        ({"damping": -0.1}, r"components\.language\.damping: .*greater than or equal to 0, found -0\.1"),
        ({"damping": float("nan")}, r"components\.language\.damping: .*found nan"),
        ({"group_size": "all"}, r"components\.language\.group_size: .*found 'all'"),
        ({"act_order": True}, r"components\.language\.act_order: not a key that is known here"),
    ],
)
def test_recipe_errors_name_the_key_and_the_value(changes, message):
    language = {"method": "gptq"} | changes
    with pytest.raises(InputError, match=message):
        parse_recipe({"name": "mine", "format": 1, "components": {"language": language}}, "mine.yaml")
