"""Weights on a trellis: bits as text gives levels, dense rotations in float64 give the weight."""

import hashlib
import struct

import numpy as np
import pytest
import torch
from codec_checks import DTYPES, check_damage_is_named
from dense_rotation import dense_rotation
from hypothesis import given, settings
from hypothesis import strategies as st

from bivlm import kernels
from bivlm.errors import InputError
from bivlm.numerics.trellis import RATES, STATE_BITS, steps_of
from bivlm.numerics.trellis_tiles import Tiles
from bivlm.packing import container, format_bits, open_packed, trellis, unpack

LAYOUTS = st.builds(
    trellis.Layout,
    state_bits=st.sampled_from(STATE_BITS),
    rate=st.sampled_from(RATES),
    sides=st.integers(1, 2),
    rotated=st.integers(0, 3),
    seed=st.sampled_from([0, 1, 2**32 - 1]),
)
PLAIN = trellis.Layout(12, 2.0, 1, 3, 7)


def contents(shape, layout, seed=0, exponent=-3):
    """Symbols, tile by tile, and magnitudes that no quantizer chose."""
    random = np.random.default_rng(seed)
    steps = np.concatenate([steps_of(layout.rate, length) for length in Tiles(shape, layout.sides).lengths])
    symbols = (random.integers(0, 8, len(steps)) & ((1 << steps.astype(int)) - 1)).astype(np.uint8)
    return symbols, trellis.stored_magnitudes(np.sort(random.uniform(0.05, 3, 8)) * 2.0**exponent, exponent)


def packed(shape, layout=PLAIN, dtype=torch.float32, seed=0, exponent=-3):
    symbols, magnitudes = contents(shape, layout, seed, exponent)
    return trellis.pack(symbols, magnitudes, layout, shape, exponent=exponent, dtype=dtype)


def by_hand(shape, layout, seed=0):
    """R_M^T Q R_N in float64: Q from a text of bits, the state the last L of them."""
    symbols, magnitudes = contents(shape, layout, seed)
    levels, code, found, at = np.concatenate([magnitudes, -magnitudes]).astype(float), layout.code, [], 0
    for length in Tiles(shape, layout.sides).lengths.tolist():
        steps = steps_of(layout.rate, length).tolist()
        text = "".join(f"{symbol:03b}"[3 - k :] for k, symbol in zip(steps, symbols[at : at + length], strict=True))
        window = text[-layout.state_bits :] if length >= 64 else "0" * layout.state_bits
        for k in steps:
            window, text = (window + text[:k])[-layout.state_bits :], text[k:]
            found.append(levels[code.table[0 if k else 1, int(window, 2)]])
        at += length
    weight = Tiles(shape, layout.sides).matrix(np.array(found))
    if layout.rotated & trellis.OUTPUTS:
        weight = dense_rotation(shape[0], layout.seed + 2**32).T @ weight
    return weight @ dense_rotation(shape[1], layout.seed) if layout.rotated & trellis.INPUTS else weight


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 80),
    columns=st.integers(1, 80),
    layout=LAYOUTS,
    dtype=st.sampled_from(DTYPES),
    native=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_bits_are_rebuilt_in_the_bytes_announced(rows, columns, layout, dtype, native, seed):
    shape = (rows, columns)
    expected = by_hand(shape, layout, seed)
    with pytest.MonkeyPatch.context() as patch:
        if not native:
            patch.setattr(kernels, "native", lambda: None)
        tensor = packed(shape, layout, dtype, seed)
        found = unpack(tensor)
        assert torch.equal(unpack(packed(shape, layout, torch.float32, seed)).to(dtype), found)
    assert tensor.numel() == trellis.packed_nbytes(shape, layout.rate, layout.sides)
    assert found.dtype == dtype and found.shape == shape
    if not layout.rotated:
        assert torch.equal(found, torch.from_numpy(expected).to(dtype))
    rounding = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 5e-3}[dtype]
    assert np.abs(found.double().numpy() - expected).max() <= rounding * max(1e-3, np.abs(expected).max())


@pytest.mark.skipif(kernels.native() is None, reason="the native code was not built")
@pytest.mark.parametrize(
    "shape", [(300, 70), (1, 700), (700, 1), (127, 129), (8, 16), (257, 33), (100, 300), (16, 272)]
)
@given(layout=LAYOUTS)
@settings(max_examples=20, deadline=None)
def test_native_code_rebuilds_the_bytes_that_numpy_and_torch_rebuild(shape, layout):
    tensor = packed(shape, layout)
    native = unpack(tensor)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "native", lambda: None)
        assert unpack(tensor).numpy().tobytes() == native.numpy().tobytes()


@pytest.mark.parametrize("layout", [PLAIN, trellis.Layout(14, 0.75, 2, 3, 2**32 - 1)])
def test_bytes_are_part_of_the_format(layout):
    tensor = packed((70, 90), layout, torch.bfloat16)
    found = [
        hashlib.sha256(each).hexdigest()[:16] for each in (tensor.numpy(), unpack(tensor).view(torch.int16).numpy())
    ]
    assert found == PINNED[layout.state_bits]


@pytest.mark.parametrize("rate", RATES)
def test_a_large_layer_pays_its_rate_and_next_to_nothing_else(rate):
    assert rate < 8 * trellis.packed_nbytes((4096, 4096), rate, 1) / 4096**2 < rate + 1e-4
    assert rate < 8 * trellis.packed_nbytes((4096, 4096), rate, 2) / 4096**2 < rate + 4e-3


def test_bits_are_the_rate_and_what_is_stored():
    layout = trellis.Layout(12, 1.25, 1, 3, 0)
    found = format_bits(packed((300, 50), layout))
    assert found.nominal == 1.25 * 300 * 50
    assert found.entropy == 100 * -(-150 * 5 // 4) + 8 * 16
    assert found.entropy < found.stored == 8 * trellis.packed_nbytes((300, 50), 1.25, 1)


@pytest.mark.parametrize("exponent", [-140, -20, 100])
def test_magnitudes_of_any_size_are_rebuilt(exponent):
    one, other = (unpack(packed((66, 70), exponent=e)).double() for e in (-3, exponent))
    bound = 1e-2 if exponent < -130 else 1e-12  # below float32's normal numbers there are fewer bits
    assert torch.allclose(other / 2.0**exponent, one / 2.0**-3, atol=bound * float(one.abs().max() * 8), rtol=bound)


def test_levels_and_layout_are_read_back():
    layout = trellis.Layout(14, 0.75, 2, trellis.OUTPUTS, 2**32 - 1)
    tensor = packed((20, 30), layout)
    codec, header = open_packed(tensor)
    assert trellis.read_layout(tensor, header) == (layout, -3)
    assert np.array_equal(codec.tunable(tensor, header).parameters["magnitudes"], contents((20, 30), layout)[1])
    indices = trellis.level_indices(tensor, header)
    assert indices.dtype == torch.uint8 and indices.shape == (20, 30) and int(indices.max()) < 16


def parameters(**changes):
    fields = {
        "state_bits": 12,
        "quarters": 8,
        "sides": 1,
        "rotated": 3,
        "exponent": -3,
        "seed": 7,
    } | changes
    return struct.pack("<BBBBhI", *fields.values())


BITS = bytes(-(-2 * 70 * 9 // 8))


@pytest.mark.parametrize(
    ("section", "content", "message"),
    [
        (0, parameters(state_bits=13), r"13 state bits, expected \(12, 14, 16\)"),
        (0, parameters(quarters=0), "0.0 bits a step, expected one of"),
        (0, parameters(quarters=13), "3.25 bits a step, expected one of"),
        (0, parameters(quarters=1), "0.25 bits a step, expected one of"),
        (0, parameters(sides=0), "sides 0, expected 1 to 2"),
        (0, parameters(sides=3), "sides 3, expected 1 to 2"),
        (0, parameters(rotated=4), "rotated 4, expected 0 to 3"),
        (0, parameters(exponent=128), "exponent 128, expected -159 to 127"),
        (0, parameters()[:-1], "9 bytes of parameters, expected 10"),
        (0, parameters(quarters=9), "too few bits for its shape"),
        (0, parameters(quarters=7), "158 bytes of bits, expected 139"),
        (1, bytes(14), "14 bytes of magnitudes, expected 16"),
        (1, b"\x00\x7c" * 8, "magnitudes: NaN or infinite, expected finite numbers"),
        (2, BITS + b"\0", "159 bytes of bits, expected 158"),
        (2, BITS[:-1], "too few bits for its shape"),
        (2, BITS[:-1] + b"\x01", "bits behind the last one are set, expected zeros"),
        (2, BITS[:-1] + b"\x08", "bits behind the last one are set, expected zeros"),
        (3, b"", "4 sections, codec 'trellis' has 3"),
    ],
)
def test_damage_is_named(section, content, message):
    check_damage_is_named(packed((70, 9)), section, content, message)


def test_magnitudes_beyond_float32_are_named():
    check_damage_is_named(packed((70, 9), exponent=120), 1, b"\xff\x7b" * 8, "expected at most 3.4e")


@pytest.mark.parametrize("shape", [(2**31, 2**31), (1, 2**32 - 1), (2**32 - 1, 1)])
def test_a_vast_shape_costs_no_memory(shape):
    """The tiles of a shape are listed only where there are bits for it."""
    tensor = packed((70, 9))
    codec, header = open_packed(tensor)
    sections = [container.section(tensor, header, index).numpy() for index in range(3)]
    with pytest.raises(InputError, match="too few bits for its shape"):
        open_packed(container.write(codec.name, shape, torch.float32, sections))


PINNED = {
    12: ["6ca6d0ba9ef8b11e", "e534e9c75eaf34ab"],
    14: ["6ff1eede6cd64016", "2567abb51a3c374f"],
}
