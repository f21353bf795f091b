"""The method against its second, literal implementation (`tests/literal.py`) and the figures of the specification."""

import math

import numpy as np
import pytest
import torch

from bivlm.compression.layer import pack_layer, relative_error
from bivlm.errors import InputError
from bivlm.methods import method
from bivlm.methods.bivlm.salient_share import evaluate_share
from bivlm.numerics.input_statistics import SiteStatistics
from bivlm.numerics.weight_statistics import LayerStatistics
from bivlm.packing import integers, unpack
from bivlm.recipe.loading import parse_recipe
from tests import literal

METHOD = method("bivlm")


def settings(**changes):
    return METHOD.Settings.model_validate({"method": "bivlm", "groups": 5, "p_max": 0.05} | changes)


def gaussian(seed, shape=(512, 512), dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def trained_like(seed, shape=(96, 160)):
    """Laplace weights with a few large columns: as far from Gaussian as an early attention layer."""
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(shape, generator=generator) - 0.5
    weight = -0.02 * uniform.sign() * torch.log1p(-2 * uniform.abs())
    weight[:, ::37] *= 4
    return (weight + 0.001).to(torch.bfloat16)


@pytest.mark.parametrize(
    ("refit", "p_max", "published"), [(False, 0.0, 0.0412), (False, 0.05, 0.0380), (True, 0.05, 0.0203)]
)
def test_error_on_unit_gaussians_is_the_published_one(refit, p_max, published):
    errors = []
    for seed in range(5):
        weight = gaussian(seed)
        plan = METHOD.plan(LayerStatistics.measure(weight, p_max), settings(refit=refit, p_max=p_max))
        errors.append(relative_error(weight, unpack(METHOD.quantize(weight, plan).packed)))
    assert np.mean(errors) == pytest.approx(published, rel=0.02)


@pytest.mark.parametrize("refit", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 5])
@pytest.mark.parametrize("p_sal", [0.0, 0.004, 0.03])
def test_error_without_quantizing_equals_the_literal_error(groups, p_sal, refit):
    weight = trained_like(groups)
    found = evaluate_share(
        LayerStatistics.measure(weight, 0.05),
        p_sal,
        groups=groups,
        salient_bits=2,
        alpha=1.4,
        iterations=10,
        refit=refit,
    )
    assert found.error == pytest.approx(literal.objective(weight.double(), p_sal, groups, refit=refit), rel=1e-9)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("groups", "refit"), [(5, False), (2, True), (1, False)])
def test_search_ends_at_the_literal_searchs_plan_and_bytes(seed, groups, refit):
    weight = trained_like(seed)
    plan = METHOD.plan(LayerStatistics.measure(weight, 0.05), settings(groups=groups, refit=refit))
    p_sal = literal.search(weight.double(), 0.05, groups, refit=refit)
    assert plan.parameters["p_sal"] == pytest.approx(p_sal, rel=1e-9)
    expected = literal.quantize(weight.double(), p_sal, groups, refit=refit)
    # Only the 16-bit scales and the rounding to bfloat16 stand between the two.
    assert torch.allclose(unpack(METHOD.quantize(weight, plan).packed).double(), expected, rtol=2**-8 + 2**-10, atol=0)


def test_statistics_of_the_tail_do_not_change_the_plan():
    """A tail kept for a larger share than the recipe's leads to the same plan."""
    weight = trained_like(9)
    chosen = settings(p_max=0.01, groups=2)
    plans = [METHOD.plan(LayerStatistics.measure(weight, share), chosen) for share in (0.01, 0.05)]
    assert plans[0] == plans[1]


def test_rate_objective_pays_for_bits_that_error_spends():
    weight = gaussian(0, dtype=torch.bfloat16)
    statistics = LayerStatistics.measure(weight, 0.05)
    records = {
        objective: pack_layer(weight, METHOD.plan(statistics, settings(objective=objective, groups=2)))[1]
        for objective in ("error", "rate")
    }
    costs = {name: record.error * 4**record.bits.stored for name, record in records.items()}
    assert records["error"].error <= records["rate"].error
    assert costs["rate"] <= costs["error"]


def test_curve_gives_the_bits_and_errors_that_packing_then_has():
    weight = trained_like(1, (128, 256))
    statistics = LayerStatistics.measure(weight, 0.05)
    chosen = settings(groups=2, objective="error")
    for point in METHOD.curve(statistics, chosen):
        packed, record = pack_layer(weight, METHOD.plan(statistics, METHOD.Settings.model_validate(point.settings)))
        assert (point.stored_bits, record.nbytes) == (8 * packed.numel() / weight.numel(), packed.numel())
        assert record.error == pytest.approx(point.error, rel=0.01)


@pytest.mark.parametrize("groups", [1, 2, 3, 5, 6])
@pytest.mark.parametrize(
    ("what", "weight", "largest_error"),
    [
        ("zeros", torch.zeros(4, 8), 0),
        ("a positive constant", torch.full((4, 8), 0.25), 0),
        ("a negative constant", torch.full((4, 8), -0.25), 1e-3),
        ("two values", torch.tensor([[1.0, -1.0] * 8]), 1e-3),
        ("one row", torch.linspace(-1, 1, 40)[None], 0.7),
        ("one column", torch.linspace(-1, 1, 40)[:, None], 0.7),
        ("one weight", torch.tensor([[0.3]]), 1e-3),
        ("a zero row", torch.cat([torch.zeros(1, 32), gaussian(1, (3, 32))]), 0.7),
        ("one outlier", torch.cat([gaussian(1, (3, 32)) * 1e-3, torch.eye(1, 32)]), 0.7),
        ("subnormal weights", gaussian(2, (4, 32)) * 1e-39, 0.7),
    ],
)
def test_degenerate_layers_have_a_defined_result(groups, what, weight, largest_error):
    weight = weight.to(torch.bfloat16)
    for refit in (False, True):
        chosen = settings(groups=groups, refit=refit)
        plan = METHOD.plan(LayerStatistics.measure(weight, 0.05), chosen)
        packed, record = pack_layer(weight, plan)
        assert unpack(packed).isfinite().all()
        assert record.error <= largest_error or (not refit and record.error < 1.5)
        assert math.isfinite(record.bits.entropy)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_weights_that_are_no_numbers_are_refused_by_name(bad):
    weight = gaussian(0, (4, 8)).to(torch.bfloat16)
    weight[1, 2] = bad
    with pytest.raises(InputError, match=r"layers\.3\.q_proj: 1 of 32 weights are NaN or infinite"):
        LayerStatistics.measure(weight, 0.01, "layers.3.q_proj")


def test_plan_for_another_shape_is_refused_by_name():
    plan = METHOD.plan(LayerStatistics.measure(trained_like(0), 0.05), settings())
    with pytest.raises(InputError, match=r"layers\.3: the plan is for shape \(96, 160\), the weight has \(160, 96\)"):
        pack_layer(trained_like(0).T.contiguous(), plan, "layers.3")


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"groups": 0}, "components.vision.groups"),
        ({"groups": "2"}, "components.vision.groups"),
        ({"p_max": 1.5}, "components.vision.p_max"),
        ({"p_max": math.nan}, "components.vision.p_max"),
        ({"objective": "speed"}, "components.vision.objective"),
        ({"colour": 1}, "components.vision.colour"),
        ({"method": "magic"}, "valid methods"),
    ],
)
def test_recipe_errors_name_the_key_and_the_value(changes, key):
    vision = {"method": "bivlm", "groups": 2, "p_max": 0.05} | changes
    with pytest.raises(InputError) as caught:
        parse_recipe({"name": "mine", "format": 1, "components": {"vision": vision}}, "mine.yaml")
    message = str(caught.value)
    assert message.startswith("mine.yaml is not valid:")
    assert all(part in message for part in key.split(".")), message


def odd(groups, **changes):
    return settings(groups=groups, p_max=0, levels="odd", **changes)


# The least errors of uniform quantizers of a Gaussian with 2, 4, 8 and 16 levels: Max 1960, table II.
@pytest.mark.parametrize(("groups", "published"), [(1, 0.3634), (2, 0.1188), (4, 0.0374), (8, 0.0115)])
def test_odd_levels_have_the_error_of_the_best_uniform_quantizer(groups, published):
    weight = gaussian(groups, (1024, 1024))
    plan = METHOD.plan(LayerStatistics.measure(weight, 0.0), odd(groups))
    error = relative_error(weight, unpack(METHOD.quantize(weight, plan).packed))
    assert error == pytest.approx(published, rel=0.01)
    assert plan.parameters["predicted_error"] == pytest.approx(error, rel=1e-4)


@pytest.mark.parametrize("groups", [1, 2, 3, 5, 8, 16])
@pytest.mark.parametrize("size", [1e-6, 0.03, 1e4])
def test_odd_levels_are_odd_multiples_in_the_file_and_no_weight_has_a_nearer_one(groups, size):
    weight = (trained_like(groups).float() * size).to(torch.bfloat16).to(torch.float32)
    plan = METHOD.plan(LayerStatistics.measure(weight, 0.0), odd(groups))
    packed = METHOD.quantize(weight, plan).packed
    opened = integers(packed)
    least = opened.scales_MG[0, 0]
    levels = torch.arange(1 - 2 * groups, 2 * groups, 2) * least
    nearest = (weight.unsqueeze(-1) - levels).abs().amin(-1)
    assert torch.allclose((weight - unpack(packed)).abs(), nearest, rtol=1e-6, atol=0)
    assert set(unpack(packed).unique().tolist()) <= set(levels.tolist())


def test_odd_levels_hold_with_error_feedback():
    weight = gaussian(0, (64, 256))
    inputs = torch.randn(512, 256, generator=torch.Generator().manual_seed(1)) @ gaussian(2, (256, 256))
    seen = SiteStatistics(inputs.T @ inputs / 512, inputs.mean(0), inputs.abs().mean(0), {"text": 512})
    plan = METHOD.plan(LayerStatistics.measure(weight, 0.0), odd(2, feedback=True))
    packed = METHOD.quantize(weight, plan, seen).packed
    assert integers(packed) is not None
    plain = METHOD.quantize(weight, METHOD.plan(LayerStatistics.measure(weight, 0.0), odd(2))).packed
    loss = [float(((weight - unpack(each)) @ inputs.T).square().sum()) for each in (packed, plain)]
    assert loss[0] < loss[1]


def test_a_layer_of_zeros_has_odd_levels_of_zero():
    weight = torch.zeros(8, 16)
    plan = METHOD.plan(LayerStatistics.measure(weight, 0.0), odd(2))
    assert not unpack(METHOD.quantize(weight, plan).packed).any()


@pytest.mark.parametrize("changes", [{"p_max": 0.01}, {"p_max": 0, "saliency": "hessian"}])
def test_odd_levels_with_salient_weights_are_refused(changes):
    component = {"method": "bivlm", "groups": 2, "levels": "odd", **changes}
    with pytest.raises(InputError, match="levels: odd: expected p_max: 0"):
        parse_recipe({"name": "r", "format": 1, "components": {"language": component}})


def test_free_levels_leave_the_settings_as_they_were_recorded():
    assert "levels" not in settings().model_dump(mode="json")
    assert odd(2).model_dump(mode="json")["levels"] == "odd"
    assert METHOD.Settings.model_validate(odd(2).model_dump(mode="json")) == odd(2)
