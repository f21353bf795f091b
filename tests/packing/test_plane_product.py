"""Products straight from planes of symbols, against float64 products with the weight that is unpacked."""

import ctypes
import mmap
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from codec_checks import pool
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_weights import grouped_weight, quantile_weight

from bivlm import kernels
from bivlm.errors import InputError
from bivlm.packing import grouped, open_packed, plane_product, product, side_table, unpack

pytestmark = pytest.mark.skipif(
    plane_product.lanes() == 0, reason="the native code was not built, or this processor has no AVX2"
)
SHAPES = [(5, 40), (16, 24), (3, 7), (1, 1), (33, 130), (130, 1000), (7, 2048), (4, 1040)]


def inputs(tokens, columns, seed=0):
    return torch.randn(tokens, columns, generator=torch.Generator().manual_seed(seed))


def check(packed, x):
    """To a millionth of what is added up."""
    found = product(packed, side_table(packed), x)
    weight = unpack(packed).double()
    assert found.dtype == torch.float32 and found.shape == (len(x), len(weight))
    largest = x.double().abs() @ weight.abs().amax(0)
    assert ((found.double() - x.double() @ weight.T).abs() <= 1e-6 * largest[:, None] + 1e-45).all()


GROUPED = {
    "bits": st.sampled_from(grouped.BITS),
    "groups": st.sampled_from([0, 16, 32, 64, 128]),
    "channels": st.booleans(),
}
LANES = [plane_product.lanes(in_bytes) for in_bytes in (False, True)]


def generated(**kinds):
    """Run a test on weights of such kinds, of any small shape, and on a few tokens, with vectors of either width."""
    return lambda test: settings(max_examples=120, deadline=None)(
        given(
            rows=st.integers(1, 40),
            columns=st.integers(1, 900),
            tokens=st.integers(1, 15),
            width=st.sampled_from([8, 16]),
            seed=st.integers(0, 99),
            **kinds,
        )(test)
    )


@contextmanager
def vectors_of(width):
    """Products with vectors of so many floats, where this machine has them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plane_product, "lanes", lambda in_bytes=False: min(width, LANES[in_bytes]))
        yield


@generated(**GROUPED)
def test_a_product_with_grouped_integers(rows, columns, bits, groups, channels, tokens, width, seed):
    packed = grouped_weight(rows, columns, bits, groups, channels, seed=seed)
    with vectors_of(width):
        check(packed, inputs(tokens, columns, seed))


@generated(
    groups=st.integers(1, 9),
    salient=st.sampled_from([(1, 0.0), (1, 0.01), (2, 0.01), (2, 0.2), (1, 0.9), (2, 0.9), (4, 0.02)]),
)
def test_a_product_with_quantile_groups(rows, columns, groups, salient, tokens, width, seed):
    packed = quantile_weight(rows, columns, groups, *salient, seed=seed)
    with vectors_of(width):
        if side_table(packed) is None:  # salient weights with symbols of their own make larger alphabets
            assert 2 * groups + (1 << salient[0]) > 16
        else:
            check(packed, inputs(tokens, columns, seed))


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


def in_int8(x, columns):
    """Inputs rounded to 127 steps of the largest of some columns."""
    words = torch.nn.functional.pad(x, (0, -x.shape[1] % columns)).unflatten(1, (-1, columns))
    scales = words.abs().amax(2, keepdim=True) / 127
    return ((words * (1 / scales).nan_to_num(posinf=0)).round() * scales).flatten(1)[:, : x.shape[1]]


WORDS = {1: 32, 2: 16, 3: 16, 4: 8, 8: 4}  # columns by the bits of a symbol


@generated(**GROUPED)
def test_int8_activations_and_grouped_integers(rows, columns, bits, groups, channels, tokens, width, seed):
    """Sums are exact: those of the rounded inputs."""
    packed, x = grouped_weight(rows, columns, bits, groups, channels, seed=seed), inputs(tokens, columns, seed)
    x *= 1 + 30 * (torch.rand(columns, generator=torch.Generator().manual_seed(seed)) < 0.02)
    codec, header = open_packed(packed)
    scales = codec.tunable(packed, header).parameters.get("channel_scales", torch.ones(columns))
    weight = unpack(packed).double() / scales.double()
    rounded = in_int8(x * scales, WORDS[bits]).double()
    with vectors_of(width):
        found = product(packed, side_table(packed), x, activations="int8")
    largest = rounded.abs() @ weight.abs().amax(0)
    assert ((found.double() - rounded @ weight.T).abs() <= 2e-6 * largest[:, None] + 1e-45).all()


@generated(
    groups=st.sampled_from([1, 2, 4, 8]),
    share=st.sampled_from([0.0, 0.01, 0.05]),
)
def test_int8_activations_and_quantile_groups(rows, columns, groups, share, tokens, width, seed):
    """Levels are rounded, too: by no more than half of 64 to 127 parts of their span."""
    packed, x = quantile_weight(rows, columns, groups, 2, share, seed=seed), inputs(tokens, columns, seed)
    weight = unpack(packed).double()
    with vectors_of(width):
        found = product(packed, side_table(packed), x, activations="int8")
    bits = (2 * groups - 1).bit_length()
    steps = (x - in_int8(x, WORDS[bits])).abs().double()
    group_scales = open_packed(packed)[0].tunable(packed, open_packed(packed)[1]).parameters["group_scales"]
    level = 2 * float(group_scales.max()) / 128
    allowed = steps @ weight.abs().T + level * x.double().abs().sum(1, keepdim=True)
    allowed += 2e-6 * (x.double().abs() @ weight.abs().T)
    if share:  # at their places inputs are not rounded, but what the symbols there stand for is
        allowed += steps @ (weight.abs() + float(group_scales.max())).T
    assert ((found.double() - x.double() @ weight.T).abs() <= 1.02 * allowed).all()


@pytest.mark.parametrize("outliers", [0, 2])
@pytest.mark.parametrize(
    "packed",
    [grouped_weight(256, 3584, bits, 128) for bits in grouped.BITS]
    + [quantile_weight(256, 3584, groups, 2, share) for groups in (1, 2, 4) for share in (0.0, 0.01)],
)
def test_int8_activations_are_within_two_percent(packed, outliers):
    x = inputs(4, 3584)
    x[:, :outliers] *= 25
    exact = x.double() @ unpack(packed).double().T
    found = product(packed, side_table(packed), x, activations="int8").double()
    assert float((found - exact).norm() / exact.norm()) < 0.02


def test_levels_in_a_simple_ratio_are_held_exactly_in_int8():
    table, unit, lowest = plane_product._level_bytes((0.25, -0.25, 0.75, -0.75))
    np.testing.assert_allclose(lowest + unit * table[:4], [0.25, -0.25, 0.75, -0.75], rtol=1e-12)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("activations", ["float32", "int8"])
@pytest.mark.parametrize("packed", [grouped_weight(9, 200, 4, 64), quantile_weight(9, 200, 2, 2, 0.02)])
def test_inputs_that_are_no_numbers_make_outputs_that_are_none(packed, activations, wrong):
    x = inputs(3, 200)
    x[1, 77] = wrong
    found = product(packed, side_table(packed), x, activations=activations)
    assert not found[1].isfinite().any() and found[[0, 2]].isfinite().all()


@pytest.mark.parametrize("activations", ["float32", "int8"])
@pytest.mark.parametrize("packed", [grouped_weight(9, 200, 4, 64), quantile_weight(9, 200, 2, 2, 0.02)])
def test_inputs_may_lie_anyhow(packed, activations):
    x, beside = inputs(4, 200), side_table(packed)
    expected = product(packed, beside, x, activations=activations)
    apart = torch.zeros(4, 3, 400)
    apart[:, 1, ::2] = x
    for other in (x.T.contiguous().T, apart[:, 1, ::2]):
        assert torch.equal(product(packed, beside, other, activations=activations), expected)
    same = x[:1].expand(4, 200)
    assert torch.equal(product(packed, beside, same, activations=activations)[3:], expected[:1])


@pytest.mark.parametrize("shape", [(3, 100), (3, 201), (200,)])
def test_inputs_of_another_width_are_refused(shape):
    packed = grouped_weight(9, 200, 4, 64)
    with pytest.raises(InputError, match=r"inputs of shape .*, expected \(tokens, 200\)"):
        product(packed, side_table(packed), torch.zeros(shape))


def test_int8_activations_where_there_are_no_such_products_are_left():
    packed, x = quantile_weight(9, 200, 3, 2, 0.02), inputs(3, 200)
    exact = product(packed, side_table(packed), x)
    assert torch.equal(product(packed, side_table(packed), x, activations="int8"), exact)


def test_without_native_code_there_are_none(monkeypatch):
    monkeypatch.setattr(kernels, "native", lambda: None)
    plane_product.lanes.cache_clear()
    try:
        assert side_table(grouped_weight(4, 64, 4, 16)) is None
    finally:
        plane_product.lanes.cache_clear()
