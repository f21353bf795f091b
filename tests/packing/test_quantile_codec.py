import numpy as np
import pytest
import torch
from codec_checks import DTYPES
from hypothesis import given, settings
from hypothesis import strategies as st

from bivlm.methods import method
from bivlm.numerics.weight_statistics import LayerStatistics, magnitude_patterns
from bivlm.packing import format_bits, open_packed, quantile, unpack

METHOD = method("bivlm")


def pack(weight, **settings):
    settings = METHOD.Settings.model_validate({"method": "bivlm", "p_max": 0.05, "groups": 2} | settings)
    statistics = LayerStatistics.measure(weight, settings.p_max)
    plan = METHOD.plan(statistics, settings)
    return plan, METHOD.quantize(weight, plan).packed


def heavy_tailed(rows, columns, seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    return (0.02 * weight * (1 + 3 * (torch.rand(rows, columns, generator=generator) < 0.03))).to(dtype)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 90),
    groups=st.integers(1, 7),
    salient_bits=st.integers(1, 4),
    p_max=st.sampled_from([0.0, 0.01, 0.3]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
def test_rebuilt_weight_is_scale_times_code_rounded_once(rows, columns, groups, salient_bits, p_max, dtype, seed):
    """Against a rebuild from the plan and the codes, which shares nothing with the codec but the stored scales."""
    weight = heavy_tailed(rows, columns, seed, dtype)
    plan, packed = pack(weight, groups=groups, salient_bits=salient_bits, p_max=p_max)
    rebuilt = unpack(packed)
    assert rebuilt.dtype == dtype and rebuilt.shape == weight.shape
    patterns = magnitude_patterns(weight).to(torch.int64)
    boundaries, scales = plan.parameters["boundaries"], np.array(plan.parameters["group_scales"])
    group = sum((patterns > boundary).to(torch.int64) for boundary in boundaries[:-1]) if groups > 1 else patterns * 0
    unsalient = patterns <= boundaries[-1]
    expected = torch.copysign(torch.from_numpy(scales)[group], weight.to(torch.float64))
    # The scale is stored with 11 significant bits, the rebuilt weight rounded once more to its dtype.
    tolerance = 2**-11 + 2.0 ** -{torch.bfloat16: 8, torch.float16: 10, torch.float32: 20}[dtype]
    difference = (rebuilt.to(torch.float64) - expected).abs()
    assert (difference <= tolerance * expected.abs() + 1e-30)[unsalient].all()
    values = [set(rebuilt[row][~unsalient[row]].tolist()) for row in range(rows)]
    assert all(len(row) <= 2**salient_bits for row in values)
    assert int((~unsalient).sum()) == plan.parameters["salient"]


@settings(max_examples=40, deadline=None)
@given(groups=st.integers(1, 6), p_max=st.sampled_from([0.0, 0.01, 0.4]), seed=st.integers(0, 100))
def test_predicted_bytes_are_the_bytes(groups, p_max, seed):
    weight = heavy_tailed(16, 80, seed, torch.bfloat16)
    plan, packed = pack(weight, groups=groups, p_max=p_max)
    positions = np.flatnonzero((magnitude_patterns(weight) > plan.parameters["boundaries"][-1]).view(-1).numpy())
    assert quantile.packed_nbytes((16, 80), groups, 2, positions) == packed.numel()
    assert format_bits(packed).stored == 8 * packed.numel()


def test_entropy_never_exceeds_what_is_stored_and_counts_the_index():
    weight = heavy_tailed(256, 256, 0, torch.bfloat16)
    for groups in (1, 2, 3, 5, 6):
        plan, packed = pack(weight, groups=groups, p_max=0.01)
        bits, size = format_bits(packed), weight.numel()
        p = plan.parameters["salient"] / size
        assert bits.entropy <= bits.stored
        assert bits.nominal == pytest.approx(size * (1 + p) + 16 * groups + 16 * 256)
        rebuilt_patterns = magnitude_patterns(weight)
        boundaries = plan.parameters["boundaries"]
        group = sum((rebuilt_patterns > b).to(torch.int64) for b in boundaries)
        shares = torch.bincount(group.view(-1)).double() / size
        index = -(shares[shares > 0] * shares[shares > 0].log2()).sum().item()
        assert bits.entropy == pytest.approx(size * (index + 1 + p) + 16 * groups + 16 * 256)


@pytest.mark.parametrize("scale", [1e-36, 1e-20, 1e-6, 1.0, 1e6, 1e30])
def test_weights_of_any_size_keep_their_relative_error(scale):
    weight = heavy_tailed(64, 64, 3, torch.float32)
    _, small = pack((weight * scale).to(torch.bfloat16))
    _, usual = pack(weight.to(torch.bfloat16))
    error = (unpack(small).double() - weight.double() * scale).norm() / (weight.double() * scale).norm()
    expected = (unpack(usual).double() - weight.double()).norm() / weight.double().norm()
    assert error.item() == pytest.approx(expected.item(), rel=0.01)


def test_many_salient_weights_move_into_the_alphabet():
    """When four weights in ten are salient, symbols of their own are smaller than positions."""
    weight = torch.randn(64, 300, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    plan, _ = pack(weight, groups=3)
    boundaries = [*plan.parameters["boundaries"][:-1], int(magnitude_patterns(torch.tensor(0.85).bfloat16()))]
    packed = METHOD.quantize(
        weight, plan.model_copy(update={"parameters": plan.parameters | {"boundaries": boundaries}})
    ).packed
    salient = weight.abs() > 0.85
    assert 0.38 < salient.double().mean() < 0.42
    # Ten symbols, three in ten bits: 3.33 bits per weight; positions alone would cost 0.97 beside 2.6 for the groups.
    assert 8 * packed.numel() / weight.numel() < 3.34 + 0.1
    rebuilt = unpack(packed)
    assert all(len(set(rebuilt[row][salient[row]].tolist())) <= 4 for row in range(64))
    scales = torch.tensor(plan.parameters["group_scales"]).bfloat16()
    assert torch.isin(rebuilt[~salient].abs(), scales).all()
    assert (rebuilt.sign() == weight.sign()).all()


def test_bytes_are_the_same_every_time():
    weight = heavy_tailed(128, 96, 5, torch.bfloat16)
    assert torch.equal(pack(weight)[1], pack(weight.clone())[1])


def test_header_needs_no_unpacking():
    _, packed = pack(heavy_tailed(8, 24, 0, torch.float16))
    _, header = open_packed(packed)
    assert (header.shape, header.dtype, header.nbytes) == ((8, 24), torch.float16, packed.numel())
