"""AWQ against a brute-force search in double precision, and what must not change its choice."""

import numpy as np
import pytest
import torch

from bivlm.compression.layer import pack_layer
from bivlm.errors import InputError
from bivlm.methods import method
from bivlm.methods.awq import channel_scales
from bivlm.methods.base import INPUTS
from bivlm.numerics.input_statistics import SiteStatistics
from bivlm.numerics.weight_statistics import LayerStatistics
from bivlm.packing import unpack
from bivlm.recipe.loading import parse_recipe

METHOD = method("awq")


def activations(tokens, channels, seed=0):
    """Inputs with a few channels much larger than the others, as after a norm layer."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, channels, generator=generator)
    return x * torch.exp(torch.randn(channels, generator=generator))


def site(x):
    return SiteStatistics(x.T @ x / len(x), x.mean(0), x.abs().mean(0), {"image": len(x) - 3, "text": 3})


def gaussian(seed, shape=(48, 96), dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def plan_for(weight, name="awq", **changes):
    chosen = method(name)
    settings = chosen.Settings.model_validate({"method": name} | changes)
    return chosen.plan(LayerStatistics.measure(weight, 0), settings)


def eleven_bits(values):
    """Rounded to 11 significant bits, as a float16 would if it had every exponent."""
    fraction, exponent = np.frexp(values)
    return np.ldexp(np.round(fraction * 2**11) / 2**11, exponent)


def brute_force(weight, x, bits, width):
    """(beta, rebuilt) with the least squared error of the outputs themselves, token by token, in float64."""
    weight, x = weight.double().numpy(), x.double().numpy()
    found = []
    for beta in np.arange(20) / 20:
        s = np.abs(x).mean(0) ** beta
        s = 1 / eleven_bits(np.sqrt(s.max() * s.min()) / s)
        rebuilt = np.empty_like(weight)
        for begin in range(0, weight.shape[1], width):
            group = (weight * s)[:, begin : begin + width]
            low, high = np.minimum(group.min(1), 0)[:, None], np.maximum(group.max(1), 0)[:, None]
            scale = eleven_bits((high - low) / (2**bits - 1))
            zero = np.round(-low / scale)
            codes = np.clip(np.round(group / scale) + zero, 0, 2**bits - 1)
            rebuilt[:, begin : begin + width] = (codes - zero) * scale
        rebuilt /= s
        found.append((np.square(x @ (rebuilt - weight).T).sum(), beta, rebuilt))
    return min(found, key=lambda item: item[:2])[1:]


@pytest.mark.parametrize(("bits", "group_size"), [(2, 32), (3, 96), (4, 40)])
@pytest.mark.parametrize("seed", range(3))
def test_scales_and_weight_are_those_of_the_brute_force_search(bits, group_size, seed):
    weight, x = gaussian(seed), activations(200, 96, seed)
    beta, rebuilt = brute_force(weight, x, bits, group_size)
    quantized = METHOD.quantize(weight, plan_for(weight, bits=bits, group_size=group_size), site(x))
    assert quantized.figures["beta"] == pytest.approx(beta)
    assert beta > 0
    assert np.allclose(unpack(quantized.packed).double().numpy(), rebuilt, rtol=1e-6)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_outputs_lose_less_than_by_rounding_to_nearest_for_16_bits_a_channel(bits):
    weight, inputs = gaussian(0, (128, 256), torch.bfloat16), site(activations(500, 256))
    _, awq = pack_layer(weight, plan_for(weight, bits=bits), inputs=inputs)
    _, rtn = pack_layer(weight, plan_for(weight, "rtn", bits=bits), inputs=inputs)
    assert awq.output_error < 0.8 * rtn.output_error
    assert awq.nbytes == rtn.nbytes + 2 * 256


def test_the_unit_of_the_inputs_changes_no_byte_and_that_of_the_weights_only_their_scale():
    weight, x = gaussian(1), activations(300, 96)
    packed = METHOD.quantize(weight, plan_for(weight), site(x)).packed
    assert torch.equal(METHOD.quantize(weight, plan_for(weight), site(1024 * x)).packed, packed)
    small = weight * 2**-10
    assert torch.equal(unpack(METHOD.quantize(small, plan_for(small), site(x)).packed), unpack(packed) * 2**-10)


def test_equal_channels_leave_nothing_to_scale():
    weight = gaussian(2, dtype=torch.bfloat16)
    inputs = SiteStatistics(torch.eye(96), torch.zeros(96), torch.ones(96), {"text": 10})
    quantized = METHOD.quantize(weight, plan_for(weight), inputs)
    assert quantized.figures == {"beta": 0.0, "dead_channels": 0, "tokens": 10}
    assert torch.equal(quantized.packed, method("rtn").quantize(weight, plan_for(weight, "rtn")).packed)


def test_a_layer_that_saw_no_token_is_rounded_to_nearest():
    weight = gaussian(3, dtype=torch.bfloat16)
    inputs = SiteStatistics(torch.zeros(96, 96), torch.zeros(96), torch.zeros(96), {"text": 0})
    quantized = METHOD.quantize(weight, plan_for(weight), inputs)
    assert quantized.figures == {"beta": 0.0, "dead_channels": 96, "tokens": 0}
    assert torch.equal(quantized.packed, method("rtn").quantize(weight, plan_for(weight, "rtn")).packed)


def test_a_dead_channel_is_scaled_as_the_quietest_live_one():
    magnitude = torch.tensor([0.0, 0.5, 8.0, 2.0])
    scales = channel_scales(magnitude, 0.5)
    assert torch.allclose(scales, torch.tensor([0.5, 0.5, 2.0, 1.0]))
    weight, x = gaussian(4), activations(200, 96)
    x[:, [2, 90]] = 0
    quantized = METHOD.quantize(weight, plan_for(weight), site(x))
    assert quantized.figures["dead_channels"] == 2
    assert unpack(quantized.packed).isfinite().all()


@pytest.mark.parametrize("magnitude", [[1e-38, 1.0], [1e-20, 1e20], [1e38, 1e38]])
def test_channels_of_any_size_have_finite_scales(magnitude):
    for beta in np.arange(1, 20) / 20:
        scales = channel_scales(torch.tensor(magnitude), float(beta))
        assert ((scales >= 0.99e-4) & (scales <= 1.01e4)).all()


@pytest.mark.parametrize(
    "weight",
    [torch.zeros(4, 96), torch.full((4, 96), -0.25), gaussian(1, (1, 96)), gaussian(2, (4, 96)) * 1e-36],
)
def test_degenerate_layers_have_a_defined_result(weight):
    packed, record = pack_layer(
        weight.to(torch.bfloat16), plan_for(weight.to(torch.bfloat16)), inputs=site(activations(50, 96))
    )
    assert unpack(packed).isfinite().all()
    assert record.output_error < 0.5


def test_it_has_to_see_the_inputs():
    assert METHOD.needs(METHOD.Settings(method="awq")) == INPUTS


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 16}, r"components\.language\.bits: .*2, 3, 4 or 8, found 16"),
        ({"group_size": None}, r"components\.language\.group_size: .*found None"),
        ({"beta": 0.5}, r"components\.language\.beta: not a key that is known here"),
    ],
)
def test_recipe_errors_name_the_key_and_the_value(changes, message):
    language = {"method": "awq"} | changes
    with pytest.raises(InputError, match=message):
        parse_recipe({"name": "mine", "format": 1, "components": {"language": language}}, "mine.yaml")
