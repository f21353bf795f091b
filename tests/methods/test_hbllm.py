"""HBLLM's row variant against its algorithm in double precision, with the Haar transform as a matrix."""

import itertools
import math
from functools import partial

import numpy as np
import pytest
import torch

from bivlm.methods import method
from bivlm.methods.hbllm import pair_columns
from bivlm.numerics.haar import haar
from tests import literal_binary as literal

METHOD = method("hbllm")
compress = partial(literal.compress, "hbllm")


def haar_matrix(length):
    """Orthonormal; the low band in even rows, the high band in odd ones, an unpaired last value alone."""
    matrix = np.eye(length)
    for i in range(0, length - 1, 2):
        matrix[i : i + 2, i : i + 2] = np.array([[1, 1], [1, -1]]) / math.sqrt(2)
    return matrix


@pytest.mark.parametrize("length", [1, 2, 7, 8, 33])
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_the_transform_is_orthonormal_and_its_own_inverse(length, dim):
    matrix = haar(torch.eye(length, dtype=torch.float64), dim).numpy()
    assert np.allclose(matrix if dim == 0 else matrix.T, haar_matrix(length))
    assert np.allclose(matrix @ matrix.T, np.eye(length), atol=1e-15)
    values = torch.randn((5, length) if dim else (length, 5), generator=torch.Generator().manual_seed(0))
    bands = haar(values, dim)
    assert float(bands.square().sum()) == pytest.approx(float(values.square().sum()), rel=1e-6)
    assert torch.allclose(haar(bands, dim), values, rtol=1e-6, atol=1e-6)


def literal_band(coefficients):
    """One band rebuilt: of all ways to split it by distance to the mean the one of least squared error."""
    mean = coefficients.mean()
    distance, signs = np.abs(coefficients - mean), np.where(coefficients < mean, -1, 1)
    best = math.inf
    for boundary in distance:
        inner = distance <= boundary
        scales = np.where(inner, distance[inner].mean(), distance[~inner].mean() if (~inner).any() else 0.0)
        error = ((distance - scales) ** 2).sum()
        if error < best - 1e-15:
            best, chosen = error, scales
    return literal.eleven_bits(mean) + signs * literal.eleven_bits(chosen)


def literal_vector(values):
    """Transformed, rebuilt band by band, transformed back."""
    matrix = haar_matrix(len(values))
    coefficients = matrix @ values
    for band in (slice(0, None, 2), slice(1, None, 2)):
        if len(coefficients[band]):
            coefficients[band] = literal_band(coefficients[band])
    return matrix.T @ coefficients


def literal_order(columns):
    """Pairs of columns by their distance, closest first; pairs in the order of their first columns."""
    free, pairs = set(range(columns.shape[1])), []
    distances = {
        pair: ((columns[:, pair[0]] - columns[:, pair[1]]) ** 2).sum() for pair in itertools.combinations(free, 2)
    }
    for pair in sorted(distances, key=distances.get):
        if free.issuperset(pair):
            pairs.append(pair)
            free -= set(pair)
    return [column for pair in sorted(pairs) for column in pair] + sorted(free)


def literal_fill(columns, salient):
    filled = columns.copy()
    ordinary = [n for n in range(columns.shape[1]) if n not in salient]
    for n in salient:
        near = [m for m in ordinary if m < n][-1:] + [m for m in ordinary if m > n][:1]
        filled[:, n] = columns[:, near].mean(1) if near else 0
    return filled


def literal_block(columns, diagonal, share, fill, pairing):
    norms = np.sqrt(((columns**2 / diagonal**2) ** 2).sum(0))
    salient = sorted(np.argsort(-norms)[: round(share * columns.shape[1])])
    order = literal_order(columns) if pairing == "greedy" else list(range(columns.shape[1]))
    ordered = columns[:, order]
    if fill == "neighbours":
        ordered = literal_fill(ordered, [place for place, n in enumerate(order) if n in salient])
    rebuilt = np.zeros_like(columns)
    rebuilt[:, order] = [literal_vector(row) for row in ordered]
    for n in salient:
        rebuilt[:, n] += literal_vector(columns[:, n] - rebuilt[:, n])
    return rebuilt


@pytest.mark.parametrize("pairing", ["none", "greedy"])
@pytest.mark.parametrize("fill", ["none", "neighbours"])
@pytest.mark.parametrize(
    ("rows", "columns", "block", "share"), [(12, 43, 16, 0.2), (13, 33, 64, 0.1), (9, 22, 12, 0.0)]
)
def test_the_rebuilt_weight_is_the_literal_algorithms(rows, columns, block, share, fill, pairing):
    weight = literal.trained_like(rows, columns, seed=3)
    moment = literal.correlated_moment(columns, seed=4)
    rebuilt, _ = compress(weight, moment, block=block, salient_share=share, fill=fill, pairing=pairing)
    changed = literal.damped(moment, 0.01)
    diagonal = literal.factor_diagonal(changed)

    def quantize(begin, block_columns):
        return literal_block(block_columns, diagonal[begin : begin + block_columns.shape[1]], share, fill, pairing)

    assert literal.agree(rebuilt, literal.quantize_blocks(weight.double().numpy(), changed, block, quantize))


@pytest.mark.parametrize("pairing", ["none", "greedy"])
def test_stored_bits_are_two_the_numbers_of_rows_and_two_more_in_salient_columns(pairing):
    """2 + 96 / block + 2 * salient share, seven bits per column for the order; the paper counts the signs alone."""
    weight = literal.trained_like(4096, 256, seed=0).to(torch.bfloat16)
    _, record = compress(weight, np.zeros((256, 256)), pairing=pairing)
    share = record.figures["salient_columns"] / 256
    assert share == 20 / 256
    order = 7 / 4096 if pairing == "greedy" else 0
    assert 2.88 < record.bits.stored < 3.25
    assert record.bits.stored == pytest.approx(2 + 96 / 128 + (2 + 96 / 4096) * share + 1 / 4096 + order, abs=1e-3)
    assert record.bits.nominal == 1 + share
    assert record.bits.nominal < record.bits.entropy <= record.bits.stored


def test_pairing_finds_columns_that_are_alike_and_is_stored():
    columns = literal.trained_like(50, 32, seed=5).T
    shuffled = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    twins = torch.cat([columns, columns + 1e-4 * literal.trained_like(50, 32, seed=6).T])[shuffled]
    pairs = shuffled[pair_columns(twins)].view(-1, 2) % 32
    assert torch.equal(pairs[:, 0], pairs[:, 1])
    paired, alone = (
        compress(twins.T.contiguous(), np.zeros((64, 64)), pairing=pairing)[1] for pairing in ("greedy", "none")
    )
    assert paired.nbytes == alone.nbytes + 7 * 64 // 8


def test_filling_salient_columns_spares_the_others():
    weight = literal.trained_like(64, 128, seed=5)
    weight[:, ::64] *= 100
    filled, alone = (
        compress(weight, np.zeros((128, 128)), fill=fill, salient_share=0.05)[0] for fill in ("neighbours", "none")
    )
    ordinary = np.arange(128) % 64 > 0
    errors = [np.square(weight.numpy() - rebuilt)[:, ordinary].sum() for rebuilt in (filled, alone)]
    assert errors[0] < 0.5 * errors[1]


def test_output_error_is_well_below_that_of_signs():
    weight, moment = literal.trained_like(64, 128, seed=5), literal.correlated_moment(128, seed=6)
    _, record = compress(weight, moment)
    assert record.output_error < 0.6 * literal.sign_error(weight.double().numpy(), moment)


@pytest.mark.parametrize("pairing", ["none", "greedy"])
@pytest.mark.parametrize("fill", ["none", "neighbours"])
@pytest.mark.parametrize("seen", ["inputs", "no token", "dead channels", "few tokens"])
@pytest.mark.parametrize(("what", "weight", "largest_error"), literal.DEGENERATE)
def test_degenerate_layers_have_a_defined_result(what, weight, largest_error, seen, fill, pairing):
    weight = weight.to(torch.bfloat16)
    moment = literal.moment_seen(weight.shape[1], seen)
    rebuilt, record = compress(weight, moment, block=16, fill=fill, pairing=pairing)
    assert np.isfinite(rebuilt).all()
    assert math.isfinite(record.bits.entropy)
    assert set(record.figures) == {"damping", "dead_channels", "tokens", "salient_columns"}
    assert record.error < 1.5
    if seen == "no token":
        assert record.error <= largest_error


@pytest.mark.parametrize("changes", [{"block": 7}, {"damping": 1.5}, {"salient_share": 0.9}, {"pairing": "best"}])
def test_settings_out_of_bounds_are_refused(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        METHOD.Settings.model_validate({"method": "hbllm"} | changes)
