import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy import stats

from bivlm.errors import InputError
from bivlm.methods.bivlm.quantile_groups import cut_offs, group
from bivlm.numerics.weight_statistics import HISTOGRAM_EDGES, LayerStatistics, magnitude_patterns, pattern_values


def weight_of(dtype, seed=0, shape=(60, 70)):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.03 + 0.002).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_moments_are_those_of_the_weights(dtype):
    weight = weight_of(dtype)
    statistics = LayerStatistics.measure(weight, 0.05)
    values = weight.double().numpy().ravel()
    assert statistics.mean == pytest.approx(values.mean(), rel=1e-12)
    assert statistics.std == pytest.approx(values.std(), rel=1e-12)
    assert statistics.square_sum == pytest.approx((values**2).sum(), rel=1e-12)
    summary = statistics.summary()
    assert (summary["min"], summary["max"]) == (values.min(), values.max())
    assert summary["kurtosis"] == pytest.approx(stats.kurtosis(values, fisher=False), rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_histogram_counts_every_magnitude(dtype):
    weight = weight_of(dtype)
    weight[0, :3] = torch.tensor([0.0, -0.0, 0.0])
    statistics = LayerStatistics.measure(weight, 0.05)
    values, counts = np.unique(weight.abs().double().numpy(), return_counts=True)
    assert np.array_equal(statistics.magnitudes_V, values)
    assert np.array_equal(statistics.counts_V, counts)
    assert statistics.summary()["zeros"] == 3 / weight.numel()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_order_of_patterns_is_order_of_magnitudes(dtype):
    infinity = int(magnitude_patterns(torch.tensor(math.inf).to(dtype)))
    values = pattern_values(np.arange(infinity, dtype=np.uint32), dtype)
    assert (np.diff(values) > 0).all()
    assert torch.equal(magnitude_patterns(-torch.tensor(values).to(dtype)).int(), torch.arange(infinity).int())


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3])
def test_tail_holds_the_weights_above_the_gaussian_cut_off(share):
    weight = weight_of(torch.bfloat16)
    statistics = LayerStatistics.measure(weight, share)
    values = weight.double().numpy().ravel()
    cut_off = values.mean() + values.std() * stats.norm.ppf(1 - share / 2)
    expected = np.flatnonzero(np.abs(values) > cut_off)
    assert np.array_equal(statistics.tail_positions_S, expected)
    assert np.array_equal(statistics.tail_weights_S, values[expected])


def test_statistics_survive_a_file(tmp_path):
    statistics = LayerStatistics.measure(weight_of(torch.bfloat16), 0.02)
    statistics.save(tmp_path / "layer.safetensors")
    loaded = LayerStatistics.load(tmp_path / "layer.safetensors")
    assert loaded.shape == statistics.shape and loaded.dtype == statistics.dtype
    assert loaded.summary() == statistics.summary()
    assert np.array_equal(loaded.tail_positions_S, statistics.tail_positions_S)
    assert np.array_equal(loaded.tail_weights_S, statistics.tail_weights_S)


def test_kl_to_the_gaussian_is_near_zero_for_gaussians_and_analytic_for_laplace():
    """KL of a Laplace distribution to the Gaussian with its moments is log(pi) / 2 - 1 / 2 = 0.0724 nats."""
    uniform = torch.rand(1000, 1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 0.5
    laplace = (-uniform.sign() * torch.log1p(-2 * uniform.abs())).float()
    gaussian = torch.randn(1000, 1000, generator=torch.Generator().manual_seed(0))
    assert LayerStatistics.measure(gaussian, 0).kl_gaussian() < 2e-4
    assert LayerStatistics.measure(laplace, 0).kl_gaussian() == pytest.approx(math.log(math.pi) / 2 - 0.5, rel=0.03)


def test_kl_of_a_constant_is_undefined():
    assert LayerStatistics.measure(torch.ones(3, 3), 0.05).kl_gaussian() is None


def test_cut_offs_split_a_gaussian_into_equal_parts():
    for p_sal in (0.0, 0.01, 0.2):
        ends = cut_offs(0, 1, p_sal, 5)
        mass = 2 * stats.norm.cdf(np.concatenate([[0], ends])) - 1
        assert np.allclose(np.diff(mass), (1 - p_sal) / 5)


def test_a_laplace_layer_has_more_salient_weights_than_their_nominal_share():
    """2.6 % at a nominal 1 %, as the specification says."""
    uniform = torch.rand(700, 700, generator=torch.Generator().manual_seed(1), dtype=torch.float64) - 0.5
    statistics = LayerStatistics.measure((-uniform.sign() * torch.log1p(-2 * uniform.abs())).bfloat16(), 0.01)
    assert len(statistics.tail_weights_S) / statistics.size == pytest.approx(0.026, abs=0.001)


def test_groups_partition_the_unsalient_weights():
    statistics = LayerStatistics.measure(weight_of(torch.bfloat16), 0.05)
    for p_sal in (0.0, 0.03):
        found = group(statistics, p_sal, 4)
        salient = statistics.counts_V[found.ranks_K[-1] :].sum()
        assert found.counts_K.sum() + salient == statistics.size


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.zeros(4), r"q_proj: expected a matrix"),
        (torch.zeros(0, 4), r"q_proj: expected a matrix"),
        (torch.zeros(4, 4, dtype=torch.int8), r"q_proj: expected bfloat16, float16, float32, found torch\.int8"),
    ],
)
def test_what_is_no_weight_matrix_is_refused_by_name(weight, message):
    with pytest.raises(InputError, match=message):
        LayerStatistics.measure(weight, 0.05, "q_proj")


def test_the_file_has_the_same_bytes_every_time(tmp_path):
    statistics = LayerStatistics.measure(weight_of(torch.bfloat16), 0.02)
    contents = set()
    for _ in range(20):
        statistics.save(tmp_path / "layer.safetensors")
        contents.add((tmp_path / "layer.safetensors").read_bytes())
    assert len(contents) == 1


def test_the_histogram_counts_the_signed_weights_between_its_edges():
    weight = weight_of(torch.bfloat16)
    statistics = LayerStatistics.measure(weight, 0.0)
    values = weight.double().numpy().ravel()
    standardised = (values - values.mean()) / values.std()
    expected = [
        np.sum((standardised > low) & (standardised <= high))
        for low, high in pairwise([-np.inf, *HISTOGRAM_EDGES, np.inf])
    ]
    assert statistics.histogram().tolist() == expected
    assert sum(statistics.summary()["histogram"]) == weight.numel()
