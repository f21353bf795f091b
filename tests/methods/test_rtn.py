"""Round to nearest against a literal loop, and its predicted errors against real ones."""

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.stats import norm

from bivlm.checkpoint.linears import linears
from bivlm.checkpoint.reading import Checkpoint
from bivlm.compression.layer import pack_layer, relative_error
from bivlm.errors import InputError
from bivlm.methods import method
from bivlm.numerics.uniform_grid import expected_error, round_to_nearest
from bivlm.numerics.weight_statistics import LayerStatistics
from bivlm.packing import unpack
from bivlm.recipe.loading import parse_recipe
from bivlm.reference import CHECKPOINT

METHOD = method("rtn")


def plan_for(weight, **changes):
    settings = METHOD.Settings.model_validate({"method": "rtn"} | changes)
    return METHOD.plan(LayerStatistics.measure(weight, 0), settings)


def gaussian(seed, shape=(512, 512), dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def laplace(seed, shape=(512, 512)):
    uniform = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) - 0.5
    return (-0.02 * uniform.sign() * torch.log1p(-2 * uniform.abs())).to(torch.bfloat16)


def literal_group(values, bits, clip=1.0):
    """One group in float64, scale rounded to 11 significant bits."""
    low, high = clip * min(values.min(), 0.0), clip * max(values.max(), 0.0)
    fraction, exponent = np.frexp((high - low) / (2**bits - 1))
    scale = np.ldexp(np.round(fraction * 2**11) / 2**11, exponent)
    zero = np.clip(np.round(-low / scale), 0, 2**bits - 1)
    codes = np.clip(np.round(values / scale) + zero, 0, 2**bits - 1)
    return (codes - zero) * scale


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [0, 1, 32, 100])
@pytest.mark.parametrize("clip", [1.0, 0.7])
def test_every_group_is_rounded_as_by_the_literal_loop(bits, group_size, clip):
    weight = gaussian(bits, (7, 150))
    rebuilt = unpack(METHOD.quantize(weight, plan_for(weight, bits=bits, group_size=group_size, clip=clip)).packed)
    width = group_size or 150
    for row in range(7):
        for begin in range(0, 150, width):
            expected = literal_group(weight[row, begin : begin + width].double().numpy(), bits, clip)
            assert np.array_equal(rebuilt[row, begin : begin + width].double().numpy(), expected)


def error_on_grid(scale, zero):
    """``E[(w - Q(w))^2]`` of a unit Gaussian on the levels ``(code - zero) * scale``, by its density."""
    levels = (np.arange(4) - zero) * scale
    edges = np.concatenate([[-np.inf], (levels[1:] + levels[:-1]) / 2, [np.inf]])
    at, inside = norm.pdf(edges), np.diff(norm.cdf(edges))
    first = at[:-1] - at[1:]
    finite = np.where(np.isfinite(edges), edges, 0.0)
    second = inside + finite[:-1] * at[:-1] - finite[1:] * at[1:]
    return float((second - 2 * levels * first + levels**2 * inside).sum())


def test_the_density_gives_the_error_of_max():
    """Max (1960), table II: four levels of equal distance for a Gaussian, step 0.9957, error 0.1188."""
    assert error_on_grid(0.9957, 1.5) == pytest.approx(0.1188, abs=5e-5)


def test_clipping_lowers_the_error_at_two_bits_as_the_density_says():
    weight, errors = gaussian(9, (256, 2048)), []
    for clip in (1.0, 0.9, 0.8, 0.7, 0.6):
        _, record = pack_layer(weight, plan_for(weight, group_size=0, clip=clip))
        low, high = clip * weight.double().amin(1), clip * weight.double().amax(1)
        scales = ((high - low) / 3).tolist()
        grids = zip(scales, (-low).tolist(), strict=True)
        expected = np.mean([error_on_grid(scale, round(zero / scale)) for scale, zero in grids])
        assert record.error == pytest.approx(expected, rel=0.01)
        errors.append(record.error)
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] > 0.1188  # the best that four levels can do


def test_zero_is_always_on_the_grid_and_no_weight_is_further_than_half_a_step():
    weight = gaussian(0, (16, 256)) + 0.7
    weight[:, ::5] = 0
    coded = round_to_nearest(weight, 3, 64)
    rebuilt = coded.rebuilt(0, 16)
    assert (rebuilt[:, ::5] == 0).all()
    # Half a step more where rounding the zero point moved the grid by as much.
    steps = coded.scales_MG.repeat_interleave(64, 1)
    assert ((rebuilt - weight).abs() <= steps * 1.001).all()
    assert ((rebuilt - weight).abs() <= steps * 0.501).double().mean() > 0.99


def test_error_at_eight_bits_is_that_of_a_uniform_quantizer():
    """``E[range^2] / (255^2 12)``, the range of 128 Gaussian draws by integrating the density of their extremes."""
    low = quad(lambda x: x * 128 * norm.pdf(x) * norm.cdf(x) ** 127, -2, 8)[0]
    spread = quad(lambda x: (x - low) ** 2 * 128 * norm.pdf(x) * norm.cdf(x) ** 127, -2, 8)[0]
    expected = ((2 * low) ** 2 + 2 * spread) / (255**2 * 12)
    weight = gaussian(1, (1024, 512))
    record = pack_layer(weight, plan_for(weight, bits=8))[1]
    assert record.error == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(("bits", "error"), [(2, 0.2526), (3, 0.0464), (4, 0.0101)])
def test_error_and_honest_bits_on_unit_gaussians(bits, error):
    weight = gaussian(2, (1024, 1024))
    record = pack_layer(weight, plan_for(weight, bits=bits))[1]
    assert record.error == pytest.approx(error, rel=0.01)
    assert record.bits.nominal == bits
    assert record.bits.stored == pytest.approx(bits + (16 + bits) / 128, abs=1e-3)


@pytest.mark.parametrize(
    "weight", [gaussian(3), gaussian(4) * 0.02 + 0.01, laplace(5)], ids=["gauss", "shift", "laplace"]
)
def test_curve_has_the_bytes_of_packing_and_within_2_percent_its_error(weight):
    weight = weight.to(torch.bfloat16)
    statistics = LayerStatistics.measure(weight, 0)
    points = METHOD.curve(statistics, METHOD.Settings(method="rtn"))
    assert len(points) == 12
    for point in points:
        _, record = pack_layer(weight, METHOD.plan(statistics, METHOD.Settings.model_validate(point.settings)))
        assert point.stored_bits == record.bits.stored
        assert point.error == pytest.approx(record.error, rel=0.02)


def test_the_curve_knows_of_clipping():
    weight = gaussian(3).to(torch.bfloat16)
    statistics = LayerStatistics.measure(weight, 0)
    for point in METHOD.curve(statistics, METHOD.Settings(method="rtn", clip=0.7)):
        assert point.settings["clip"] == 0.7
        _, record = pack_layer(weight, METHOD.plan(statistics, METHOD.Settings.model_validate(point.settings)))
        assert point.error == pytest.approx(record.error, rel=0.02)


def test_a_narrow_layer_is_offered_every_width_once():
    statistics = LayerStatistics.measure(gaussian(8, (16, 100)), 0)
    points = METHOD.curve(statistics, METHOD.Settings(method="rtn"))
    assert [point.settings["group_size"] for point in points] == 3 * [32, 64, 128]


def test_predicted_errors_of_trained_layers_are_within_6_percent():
    checkpoint = Checkpoint.open(CHECKPOINT)
    for linear in [linear for linear in linears(checkpoint) if linear.tied_to is None][::6]:
        weight = checkpoint.read(linear.disk_name)
        statistics = LayerStatistics.measure(weight, 0)
        for bits in (2, 4):
            coded = round_to_nearest(weight, bits, 128)
            error = relative_error(weight, coded.rebuilt(0, len(weight)))
            assert expected_error(statistics, bits, 128) == pytest.approx(error, rel=0.06)


def test_a_short_last_group_counts_in_the_prediction():
    weight = gaussian(6, (2048, 72))
    error = relative_error(weight, round_to_nearest(weight, 2, 64).rebuilt(0, 2048))
    assert expected_error(LayerStatistics.measure(weight, 0), 2, 64) == pytest.approx(error, rel=0.02)


@pytest.mark.parametrize("group_size", [0, 3, 128])
@pytest.mark.parametrize(
    ("what", "weight", "largest_error"),
    [
        ("zeros", torch.zeros(4, 8), 0),
        ("a positive constant", torch.full((4, 8), 0.25), 1e-3),
        ("a negative constant", torch.full((4, 8), -0.25), 1e-3),
        ("one row", torch.linspace(-1, 1, 40)[None], 0.2),
        ("one column", torch.linspace(-1, 1, 40)[:, None], 1e-3),
        ("one weight", torch.tensor([[0.3]]), 1e-3),
        ("a zero row", torch.cat([torch.zeros(1, 32), gaussian(1, (3, 32))]), 0.3),
        ("one outlier", torch.cat([gaussian(1, (3, 32)) * 1e-3, torch.eye(1, 32)]), 1e-3),
        ("subnormal weights", gaussian(2, (4, 32)) * 1e-39, 0.3),
        ("huge weights", gaussian(2, (4, 32)).clamp(-3, 3) * 1e38, 0.3),
    ],
)
def test_degenerate_layers_have_a_defined_result(what, weight, largest_error, group_size):
    weight = weight.to(torch.bfloat16)
    packed, record = pack_layer(weight, plan_for(weight, group_size=group_size))
    assert unpack(packed).isfinite().all()
    assert record.error <= largest_error
    curve = METHOD.curve(LayerStatistics.measure(weight, 0), METHOD.Settings(method="rtn"))
    assert all(0 <= point.error < 1 for point in curve)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 5}, r"components\.vision\.bits: .*2, 3, 4 or 8, found 5"),
        ({"bits": 0}, r"components\.vision\.bits: .*2, 3, 4 or 8, found 0"),
        ({"bits": "2"}, r"components\.vision\.bits: .*found '2'"),
        ({"group_size": -1}, r"components\.vision\.group_size: .*greater than or equal to 0, found -1"),
        ({"group_size": 64.5}, r"components\.vision\.group_size: .*found 64\.5"),
        ({"clip": 0.0}, r"components\.vision\.clip: .*greater than 0, found 0\.0"),
        ({"clip": 1.01}, r"components\.vision\.clip: .*less than or equal to 1, found 1\.01"),
        ({"damping": 0.01}, r"components\.vision\.damping: not a key that is known here, found 0\.01"),
    ],
)
def test_recipe_errors_name_the_key_and_the_value(changes, message):
    with pytest.raises(InputError, match=message):
        parse_recipe({"name": "mine", "format": 1, "components": {"vision": {"method": "rtn"} | changes}}, "mine.yaml")
