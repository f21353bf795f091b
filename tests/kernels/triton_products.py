"""GPU products on a CPU: Triton's interpreter runs the kernels. `test_triton.py` starts this file in another process.

The interpreter must be chosen before Triton is imported, and torch may have done that in the process of other tests.
Codecs are told that the CPU is a GPU.
"""

import copy
import ctypes
import gc
import mmap

import numpy as np
import pytest
import torch
import triton
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_weights import grouped_weight, quantile_weight, trellis_weight
from torch import nn

from bivlm import packing
from bivlm.checkpoint.packed_modules import PackedLinear
from bivlm.kernels import gpu
from bivlm.numerics.trellis import RATES
from bivlm.packing import grouped, open_packed, product, side_table, trellis, unpack


@pytest.fixture(autouse=True, scope="module")
def _everything_is_a_gpu():
    assert triton.knobs.runtime.interpret, "run with TRITON_INTERPRET=1"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "on_gpu", lambda device: True)
        yield


def inputs(tokens, columns, dtype=torch.float32, seed=0):
    return torch.randn(tokens, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check(packed, x, exactness=1e-6):
    """To a millionth of what is added up."""
    found, weight = product(packed, side_table(packed), x), unpack(packed).double()
    assert found.dtype == torch.float32 and found.shape == (len(x), len(weight))
    largest = (x.double().norm(dim=1) * weight.norm(dim=1).amax())[:, None]
    assert ((found.double() - x.double() @ weight.T).abs() <= exactness * largest + 1e-44).all()


@settings(max_examples=12, deadline=None)
@given(
    rows=st.sampled_from([1, 4, 7, 66]),
    columns=st.integers(1, 200),
    bits=st.sampled_from(grouped.BITS),
    group=st.sampled_from([0, 16, 32, 128]),
    channels=st.booleans(),
    tokens=st.sampled_from([1, 3, 17]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
def test_a_product_with_grouped_integers(rows, columns, bits, group, channels, tokens, dtype):
    check(grouped_weight(rows, columns, bits, group, channels), inputs(tokens, columns, dtype))


@settings(max_examples=16, deadline=None)
@given(
    rows=st.sampled_from([1, 4, 7, 66]),
    columns=st.integers(1, 200),
    groups=st.integers(1, 8),
    salient=st.sampled_from([(1, 0.0), (2, 0.01), (2, 0.2), (1, 0.9), (4, 0.02)]),
    tokens=st.sampled_from([1, 3, 17]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
def test_a_product_with_quantile_groups(rows, columns, groups, salient, tokens, dtype):
    packed = quantile_weight(rows, columns, groups, *salient)
    if side_table(packed) is None:  # salient weights with symbols of their own make larger alphabets
        assert 2 * groups + (1 << salient[0]) > 16 or (salient[0], groups) == (4, 8)
    else:
        check(packed, inputs(tokens, columns, dtype))


@pytest.mark.parametrize("tokens", [1, 17])
@pytest.mark.parametrize(
    "packed", [quantile_weight(5, 70, 1, 2, 0.9), *(quantile_weight(5, 70, groups, 1, 0.5) for groups in range(2, 8))]
)
def test_salient_weights_with_symbols_of_their_own(packed, tokens):
    assert len(side_table(packed)) == 0
    check(packed, inputs(tokens, 70))


@settings(max_examples=10, deadline=None)
@given(
    shape=st.sampled_from([(1, 1), (3, 5), (40, 30), (63, 9), (64, 20), (66, 50), (259, 17), (21, 150)]),
    rate=st.sampled_from(RATES),
    sides=st.integers(1, 2),
    rotated=st.integers(0, 3),
    tokens=st.sampled_from([1, 3, 5]),
    seed=st.integers(0, 99),
)
def test_a_product_with_a_trellis(shape, rate, sides, rotated, tokens, seed):
    check(trellis_weight(*shape, rate, sides, rotated, seed=seed), inputs(tokens, shape[1]))


@pytest.mark.parametrize("rate", RATES[::2])
def test_rates_with_and_without_bits_in_every_step(rate):
    check(trellis_weight(70, 11, rate, 1), inputs(2, 11))
    check(trellis_weight(70, 11, rate, 1), inputs(17, 11))
    check(trellis_weight(70, 11, rate, 2), inputs(2, 11))


def test_columns_are_shared_out_and_added_up_in_one_order():
    for packed in (grouped_weight(2, 1100, 4, 0), quantile_weight(5, 2100, 2, 2, 0.01), trellis_weight(64, 90, 2.0, 1)):
        x = inputs(1, open_packed(packed)[1].shape[1])
        check(packed, x)
        assert torch.equal(product(packed, side_table(packed), x), product(packed, side_table(packed), x))


@pytest.mark.parametrize("scale", [2.0**-90, 2.0**90])
def test_numbers_of_any_size(scale):
    for packed in (
        grouped_weight(6, 100, 4, 32, scale=scale),
        quantile_weight(6, 100, 2, 2, 0.1, scale=scale),
        trellis_weight(6, 100, 2.0, 1, 3, scale=scale),
    ):
        check(packed, inputs(2, 100))


@pytest.mark.parametrize(
    "packed",
    [
        *(quantile_weight(9, columns, groups, 2, 0.05) for groups in (2, 3, 4) for columns in (1, 51)),
        *(grouped_weight(9, 51, bits, 0) for bits in grouped.BITS),
        *(
            trellis_weight(*shape, rate, sides)
            for shape in ((67, 5), (5, 67))
            for rate in (0.5, 3.0)
            for sides in (1, 2)
        ),
    ],
)
def test_nothing_is_read_behind_the_bytes(packed):
    """The packed weight ends with a page, and the next one cannot be read."""
    page = mmap.PAGESIZE
    inside = -(-len(packed) // page) * page
    whole = np.frombuffer(mmap.mmap(-1, inside + page), np.uint8)
    mprotect = ctypes.CDLL(None, use_errno=True).mprotect
    assert mprotect(ctypes.c_void_p(whole.ctypes.data + inside), ctypes.c_size_t(page), 0) == 0
    whole[inside - len(packed) : inside] = packed.numpy()
    check(torch.from_numpy(whole[inside - len(packed) : inside]), inputs(2, open_packed(packed)[1].shape[1]))


def test_what_is_not_multiplied():
    assert side_table(grouped_weight(4, 128, 4, 4)) is None
    assert side_table(quantile_weight(4, 128, 9)) is None
    assert side_table(quantile_weight(1, 70_000, 2, 2, 0.01)) is None
    symbols = np.zeros(128, np.uint8)
    magnitudes = trellis.stored_magnitudes(np.ones(8, np.float32), 0)
    free = trellis.Layout(14, 2.0, 1, 0, 0)
    assert side_table(trellis.pack(symbols, magnitudes, free, (64, 2), exponent=0, dtype=torch.float32)) is None


def test_the_bytes_are_looked_at_once(monkeypatch):
    packed, x = quantile_weight(4, 50, 2, 2, 0.1), inputs(1, 50)
    beside = side_table(packed)
    first, kept = product(packed, beside, x), len(packing._gpu_products())
    with monkeypatch.context() as patch:
        patch.setattr(packing, "open_packed", None)
        assert torch.equal(product(packed, beside, x), first)
    other = quantile_weight(4, 50, 2, 2, 0.1, scale=2.0)
    assert torch.equal(product(other, beside, x), 2 * first)  # of the same places
    del beside
    gc.collect()
    assert len(packing._gpu_products()) < kept


def layer(packed, dtype):
    rows, columns = open_packed(packed)[1].shape
    found = PackedLinear.replacing(nn.Linear(columns, rows, dtype=dtype), packed.numel(), "tower.fc1")
    found.weight.data.copy_(packed)
    found.bias = nn.Parameter(torch.randn(rows, dtype=dtype))
    found.go_straight()
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    "packed", [quantile_weight(24, 90, 2, 2, 0.02), grouped_weight(24, 90, 3, 32), trellis_weight(70, 20, 1.5, 1, 3)]
)
def test_a_layer_goes_straight_and_is_compiled(packed, dtype, monkeypatch):
    chosen = layer(packed, dtype)
    x = inputs(6, chosen.in_features, dtype).view(2, 3, -1)
    expected = (x.double() @ unpack(packed).double().T + chosen.bias.double()).to(dtype)
    monkeypatch.setattr("bivlm.checkpoint.packed_modules._rebuilt", None)
    torch._dynamo.reset()
    with torch.no_grad():
        found = chosen(x)
        torch.testing.assert_close(found, expected, rtol=2 * torch.finfo(dtype).eps, atol=2e-5)
        assert torch.equal(torch.compile(chosen, fullgraph=True, backend="eager")(x), found)
        assert torch.equal(copy.deepcopy(chosen)(x), found)


def test_a_compiled_layer_looks_at_its_bytes_once(monkeypatch):
    chosen, x = layer(quantile_weight(8, 40, 2), torch.float32), inputs(1, 40)
    torch._dynamo.reset()
    compiled = torch.compile(chosen, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        first = compiled(x)
        monkeypatch.setattr(packing, "open_packed", None)
        assert torch.equal(compiled(x), first)


def test_a_layer_that_is_moved_asks_again():
    chosen = layer(quantile_weight(8, 40, 2, 2, 0.1), torch.float32)
    assert chosen.straight_on == "cpu"
    kept = chosen.side_table
    chosen.to(torch.float16)
    assert chosen.straight_on == "cpu" and torch.equal(chosen.side_table, kept)
    chosen.straight_on, chosen.side_table = "cuda", None  # as if it came from there, without Triton
    with torch.no_grad():
        chosen(inputs(1, 40, torch.float16))  # is rebuilt: nothing was said of this device
    chosen.to("cpu")
    assert chosen.straight_on == "cpu" and torch.equal(chosen.side_table, kept)
    chosen.to("meta")
    assert chosen.straight_on is None and chosen.side_table is None
    chosen.to_empty(device="cpu")
    assert chosen.side_table is None
