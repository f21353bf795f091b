"""Products straight from planes of symbols, against float64 products with the weight that is unpacked."""

import ctypes
import mmap

import numpy as np
import pytest
import torch
from codec_checks import pool
from hypothesis import given, settings
from hypothesis import strategies as st

from bivlm import kernels
from bivlm.numerics.uniform_grid import round_to_nearest
from bivlm.packing import grouped, open_packed, plane_product, product, quantile, side_table, unpack

pytestmark = pytest.mark.skipif(
    plane_product.lanes() == 0, reason="the native code was not built, or this processor has no AVX2"
)
SHAPES = [(5, 40), (16, 24), (3, 7), (1, 1), (33, 130), (130, 1000), (7, 2048), (4, 1040)]


def grouped_weight(rows, columns, bits, group, channels=False, scale=1.0, seed=0):
    rng = torch.Generator().manual_seed(seed)
    scales = grouped.stored_channel_scales(torch.rand(columns, generator=rng) + 0.5) if channels else None
    coded = round_to_nearest(torch.randn(rows, columns, generator=rng) * scale + scale / 4, bits, group)
    return grouped.pack(coded, torch.float32, scales)


def quantile_weight(rows, columns, groups, salient_bits, share, scale=1.0, seed=0):
    rng, size = np.random.default_rng(seed), rows * columns
    count = round(share * size)
    return quantile.pack(
        (rows, columns),
        torch.float32,
        quantile.ready(torch.from_numpy(rng.integers(0, 2 * groups, (rows, columns), dtype=np.uint8))),
        group_scales_K=np.sort(rng.random(groups) + 0.05) * scale,
        salient_bits=salient_bits,
        positions_S=np.sort(rng.choice(size, count, replace=False)),
        levels_S=rng.integers(0, 1 << salient_bits, count),
        centres_L=np.sort(rng.standard_normal(1 << salient_bits)),
        row_scales_M=(rng.random(rows) + 1) * scale,
    )


def inputs(tokens, columns, seed=0):
    return torch.randn(tokens, columns, generator=torch.Generator().manual_seed(seed))


def check(packed, x):
    """To a millionth of what is added up."""
    found = product(packed, side_table(packed), x)
    weight = unpack(packed).double()
    assert found.dtype == torch.float32 and found.shape == (len(x), len(weight))
    largest = x.double().abs() @ weight.abs().amax(0)
    assert ((found.double() - x.double() @ weight.T).abs() <= 1e-6 * largest[:, None] + 1e-45).all()


@settings(max_examples=120, deadline=None)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 900),
    bits=st.sampled_from(grouped.BITS),
    groups=st.sampled_from([0, 16, 32, 64, 128]),
    channels=st.booleans(),
    tokens=st.integers(1, 15),
    width=st.sampled_from([8, 16]),
    seed=st.integers(0, 99),
)
def test_a_product_with_grouped_integers(rows, columns, bits, groups, channels, tokens, width, seed):
    packed = grouped_weight(rows, columns, bits, groups, channels, seed=seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plane_product, "lanes", lambda: min(width, LANES))
        check(packed, inputs(tokens, columns, seed))


@settings(max_examples=120, deadline=None)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 900),
    groups=st.integers(1, 9),
    salient=st.sampled_from([(1, 0.0), (1, 0.01), (2, 0.01), (2, 0.2), (1, 0.9), (2, 0.9), (4, 0.02)]),
    tokens=st.integers(1, 15),
    width=st.sampled_from([8, 16]),
    seed=st.integers(0, 99),
)
def test_a_product_with_quantile_groups(rows, columns, groups, salient, tokens, width, seed):
    packed = quantile_weight(rows, columns, groups, *salient, seed=seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plane_product, "lanes", lambda: min(width, LANES))
        if side_table(packed) is None:  # salient weights with symbols of their own make larger alphabets
            assert 2 * groups + (1 << salient[0]) > 16
        else:
            check(packed, inputs(tokens, columns, seed))


LANES = plane_product.lanes()


@pytest.mark.parametrize("codec", ["grouped", "quantile"])
def test_what_is_multiplied_at_all(codec):
    packed = pool(codec, SHAPES, [torch.float32])
    straight = [each for each in packed if side_table(each) is not None]
    assert len(straight) >= len(packed) // 2
    for each in straight:
        check(each, inputs(3, open_packed(each)[1].shape[1]))


@pytest.mark.parametrize("bits", grouped.BITS)
def test_groups_that_end_within_words_are_not(bits):
    word = {2: 16, 3: 16, 4: 8, 8: 4}[bits]
    assert side_table(grouped_weight(4, 128, bits, word)) is not None
    assert side_table(grouped_weight(4, 128, bits, word // 2)) is None
    assert side_table(grouped_weight(4, 128, bits, word + word // 2)) is None


@pytest.mark.parametrize("scale", [1e-30, 1e-8, 1e30])
def test_numbers_of_any_size(scale):
    for packed in (grouped_weight(6, 200, 4, 64, scale=scale), quantile_weight(6, 200, 2, 2, 0.1, scale=scale)):
        check(packed, inputs(2, 200))


@pytest.mark.parametrize(
    "packed", [grouped_weight(700, 1000, 4, 128), quantile_weight(700, 1000, 3, 2, 0.05)], ids=["grouped", "quantile"]
)
def test_neither_threads_nor_tokens_change_a_bit(packed):
    x, threads = inputs(15, 1000), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = product(packed, side_table(packed), x)
        torch.set_num_threads(3)
        assert torch.equal(product(packed, side_table(packed), x), one)
    finally:
        torch.set_num_threads(threads)
    codec = open_packed(packed)[0].name
    for tokens in (1, 2, 3, 7):
        some = product(packed, side_table(packed), x[:tokens])
        # Salient weights of a single token are added up four by four.
        torch.testing.assert_close(some, one[:tokens], rtol=0, atol=0 if codec == "grouped" else 1e-4)


@pytest.mark.parametrize("columns", [1, 50, 513])
@pytest.mark.parametrize("groups", [1, 2, 3, 4, 5])
def test_nothing_is_read_behind_the_bytes(groups, columns):
    """The packed weight ends with a page, and the next one cannot be read."""
    weights = [quantile_weight(9, columns, groups, 2, share) for share in (0.0, 0.05)]
    weights += [grouped_weight(9, columns, bits, 0) for bits in grouped.BITS]
    for packed in weights:
        assert side_table(packed) is not None
        page = mmap.PAGESIZE
        inside = -(-len(packed) // page) * page
        whole = np.frombuffer(mmap.mmap(-1, inside + page), np.uint8)
        mprotect = ctypes.CDLL(None, use_errno=True).mprotect
        assert mprotect(ctypes.c_void_p(whole.ctypes.data + inside), ctypes.c_size_t(page), 0) == 0
        whole[inside - len(packed) : inside] = packed.numpy()
        check(torch.from_numpy(whole[inside - len(packed) : inside]), inputs(2, columns))


def test_without_native_code_there_are_none(monkeypatch):
    monkeypatch.setattr(kernels, "native", lambda: None)
    plane_product.lanes.cache_clear()
    try:
        assert side_table(grouped_weight(4, 64, 4, 16)) is None
    finally:
        plane_product.lanes.cache_clear()
