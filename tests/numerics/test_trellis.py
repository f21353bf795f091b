"""The trellis against every path of short sequences, a search in floating point, and bits written as text."""

import hashlib
import itertools
import json
from importlib import resources

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bivlm import kernels
from bivlm.errors import InputError
from bivlm.numerics import trellis
from bivlm.numerics.trellis import (
    FREE_STATE_BITS,
    PLACES,
    RATES,
    SHORTEST,
    STATE_BITS,
    WINDOW_CODES,
    bits_of,
    from_bytes,
    from_json,
    level_indices,
    levels_of,
    pattern,
    read,
    search,
    states_of,
    steps_of,
    to_bytes,
    to_json,
    trellis_code,
    write,
)

CODES = [(state_bits, rate) for state_bits in STATE_BITS for rate in RATES]
FREE_CODES = [(state_bits, rate) for state_bits, rate in CODES if state_bits in FREE_STATE_BITS]
needs_native = pytest.mark.skipif(kernels.native() is None, reason="the native code was not built")


def gaussian(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def rebuilt(symbols, code):
    return levels_of(code.magnitudes)[level_indices(symbols, code)].astype(np.float64)


def squared_error(x, symbols, code):
    """Of each sequence, float64 (R,)."""
    return np.square(x - rebuilt(symbols, code)).sum(1)


def searched(x, code, weights=None):
    """The symbols of the best paths; what they stand for is what their bits say."""
    symbols, indices = search(x, code, levels_of(code.magnitudes), weights)
    assert np.array_equal(indices, level_indices(symbols, code))
    return symbols


def levels_by_text(bits, length, code):
    """The level of every number, from a text of ones and zeros: the state is the last L of them."""
    before = (bits if length >= SHORTEST else "0" * code.state_bits)[-code.state_bits :]
    whole, at, found = before + bits, code.state_bits, []
    for step in range(length):
        at += code.pattern[step % 4]
        state = int(whole[at - code.state_bits : at], 2)
        found.append(int(code.table[int(code.pattern[step % 4] == 0)][state]))
    assert at == len(whole)
    return found


def as_text(symbols, rate):
    steps = steps_of(rate, len(symbols))
    return "".join(f"{symbol:0{bits}b}" if bits else "" for symbol, bits in zip(symbols, steps, strict=True))


def best_error(x, code, begin, weights=None):
    """Viterbi's search in float64 of one sequence: the least squared error by the last state.

    `begin` (..., states) are the costs of the states before the first step.
    """
    states, cost = np.arange(1 << code.state_bits), np.array(begin, np.float64)
    levels = levels_of(code.magnitudes).astype(np.float64)
    for step, number in enumerate(x):
        bits = code.pattern[step % 4]
        dropped = np.arange(1 << bits)[:, None] << (code.state_bits - bits)
        cost = cost[..., dropped | states >> bits].min(-2)
        weight = 1.0 if weights is None else weights[step]
        cost = cost + weight * np.square(number - levels[code.table[int(bits == 0)]])
    return cost


def what_units_cost(length, rate):
    """How much worse than in float64 a path may be: every step rounds costs, by up to their lowest bits."""
    return length**0.5 * 2 ** max(1, *pattern(rate)) / (1024 * rate)


class TestSearch:
    @pytest.mark.parametrize("rate", RATES)
    def test_a_short_sequence_has_the_best_of_all_paths(self, rate):
        """From state 0, as far as there are up to 2^12 paths."""
        code = trellis_code(12, rate)
        length = next(n for n in range(24, 0, -1) if steps_of(rate, n).sum() <= 12)
        steps = [range(1 << bits) for bits in steps_of(rate, length).tolist()]
        every = np.array(list(itertools.product(*steps)), np.uint8)
        levels = rebuilt(every, code)
        reach = 1 + code.magnitudes[-1]  # further numbers count as if they were there
        for x in np.clip(gaussian(20, length, seed=1), -reach, reach):
            least = np.square(x - levels).sum(1).min()
            found = squared_error(x[None], searched(x[None], code), code)[0]
            assert least - 1e-6 <= found <= least + what_units_cost(length, rate)

    @pytest.mark.parametrize(
        ("state_bits", "rate"), [(12, 0.5), (12, 0.75), (12, 1.25), (12, 2.0), (12, 3.0), (14, 2.0)]
    )
    @pytest.mark.parametrize("length", [64, 117, 256])
    def test_a_long_one_has_the_best_path_of_its_seam_and_a_good_seam(self, state_bits, rate, length):
        code, excess, least = trellis_code(state_bits, rate), 0.0, 0.0
        for x in gaussian(3, length, seed=length):
            symbols = searched(x[None], code)
            found = squared_error(x[None], symbols, code)[0]
            # Of the state at the seam the first step drops the oldest bits.
            every = 1 << (state_bits - code.pattern[0])
            there = np.arange(1 << state_bits) % every == int(states_of(symbols, code)[0, -1]) % every
            at_seam = best_error(x, code, np.where(there, 0, np.inf))[there].min()
            assert at_seam - 1e-6 <= found <= at_seam + what_units_cost(length, rate)
            excess, least = excess + found, least + best_error(x, code, np.zeros(1 << state_bits)).min()
        # Free ends are worth the bits of a state, and an error falls by four with a bit per number.
        assert least < excess < least * 1.05 * 4 ** (state_bits / length)

    # Around the seam of a short sequence its two ends overlap. In whole tiles, too, the best path of some 60 numbers
    # around it is not always through the best seam: with all of the tile the error would be lower by 1.3 % at two bits
    # (0.0691 for 0.0700 of 600 sequences), and the search would take 1.6 times as long.
    @pytest.mark.slow
    @pytest.mark.parametrize("rate", [1.0, 2.0])
    @pytest.mark.parametrize(("length", "sequences", "bound"), [(64, 12, 1.1), (256, 4, 1.035)])
    def test_hardly_any_seam_is_better_than_the_one_found(self, rate, length, sequences, bound):
        code, kept, lost = trellis_code(12, rate), 0.0, 0.0
        seams = np.arange(1 << 12 - code.pattern[0])
        begin = np.where(np.arange(1 << 12) % len(seams) == seams[:, None], 0, np.inf)
        for x in gaussian(sequences, length, seed=10):
            ends = best_error(x, code, begin).reshape(len(seams), -1, len(seams)).min(1)
            kept += ends.diagonal().min()
            lost += squared_error(x[None], searched(x[None], code), code)[0]
        assert kept - 1e-6 <= lost < bound * kept

    def test_weights_count(self):
        code, x = trellis_code(12, 1.5), gaussian(4, 90, seed=3)
        weights = np.exp(gaussian(4, 90, seed=4))
        weights /= weights.mean(1, keepdims=True)
        plain, weighted = searched(x, code), searched(x, code, weights)

        def error(symbols):
            return (weights * np.square(x - rebuilt(symbols, code))).sum()

        assert error(weighted) < 0.85 * error(plain)
        for row, symbols in enumerate(weighted):
            there = np.arange(1 << 12) % 1024 == int(states_of(weighted, code)[row, -1]) % 1024
            least = best_error(x[row], code, np.where(there, 0, np.inf), weights[row])[there].min()
            found = (weights[row] * np.square(x[row] - rebuilt(symbols[None], code)[0])).sum()
            assert least - 1e-6 <= found <= least + what_units_cost(90, 1.5)

    def test_levels_other_than_the_codes_own_are_met(self):
        """Stored levels are rounded, those of another sequence scaled."""
        code, x = trellis_code(12, 2.0), gaussian(1, 100, seed=5)
        twice, _ = search(2 * x, code, levels_of(code.magnitudes * 2))
        assert squared_error(x, twice, code)[0] == pytest.approx(squared_error(x, searched(x, code), code)[0], rel=0.02)

    @pytest.mark.parametrize("length", [1, 2, 3, 63, 64])
    def test_numbers_beyond_all_levels_count_as_one_beyond_them(self, length):
        code = trellis_code(12, 3.0)
        x = np.full((2, length), 1 + code.magnitudes[-1], np.float32)
        x[1] *= -1
        found = searched(x, code)
        assert np.array_equal(found, searched(x * np.float32(1e30), code))
        kept = np.sign(rebuilt(found, code)) == np.sign(x)
        assert kept.mean() > 0.9

    def test_sequences_do_not_see_each_other(self):
        code, x = trellis_code(12, 1.25), gaussian(5, 80, seed=6)
        together = searched(x, code)
        assert all(np.array_equal(searched(x[row : row + 1], code)[0], together[row]) for row in range(5))


@pytest.mark.parametrize(
    ("state_bits", "rate", "bound", "shannon"),
    [
        *[(12, 2.0, 0.073, 2**-4.0), (12, 1.5, 0.142, 2**-3.0), (12, 1.25, 0.198, 2**-2.5), (12, 1.0, 0.275, 2**-2.0)],
        (14, 2.0, 0.0705, 2**-4.0),
    ],
)
def test_a_gaussian_costs_little_more_than_shannons_bound(state_bits, rate, bound, shannon):
    x, code = gaussian(400, 256, seed=7), trellis_code(state_bits, rate)
    found = squared_error(x, searched(x, code), code).mean() / 256
    assert shannon < found < bound


class TestWindows:
    """Codes whose tables are by windows of four bits."""

    @pytest.mark.parametrize("rate", RATES)
    def test_a_code_is_its_json_and_its_error_is_the_one_measured(self, rate):
        code = trellis_code(12, rate)
        content = json.loads(WINDOW_CODES.read_text())[str(rate)]
        assert to_json(code) == to_json(from_json(content, rate)) == content
        assert len(content["tables"]) == (2 if rate < 1 else 1)
        assert (np.diff(code.magnitudes) > 0).all() and code.magnitudes[0] > 0
        x = gaussian(160, 256, seed=8)
        found = squared_error(x, searched(x, code), code).mean() / 256
        assert found == pytest.approx(code.error, rel=0.03)

    @pytest.mark.parametrize("rate", [0.5, 2.0, 2.75])
    def test_a_level_is_at_the_place_that_the_windows_of_its_state_say(self, rate):
        code = trellis_code(12, rate)
        rising = np.concatenate([-code.magnitudes[::-1], code.magnitudes])
        shares = [1, 1, 2, 4, 5, 6, 6, 7]
        places = np.repeat(rising, [*shares, *shares[::-1]])
        assert len(places) == PLACES
        for state in np.random.default_rng(0).integers(0, 1 << 12, 200).tolist():
            text = f"{state:012b}"
            for kind in (0, 1):
                oldest, middle, newest = (int(text[at : at + 4], 2) for at in (0, 4, 8))
                tables = code.windows[kind].tolist()
                place = tables[0][newest] ^ tables[1][middle] ^ tables[2][oldest]
                assert levels_of(code.magnitudes)[code.table[kind, state]] == places[place]


class TestCodes:
    @pytest.mark.parametrize(("state_bits", "rate"), FREE_CODES)
    def test_a_file_is_a_code_and_its_error_is_the_one_measured(self, state_bits, rate):
        content = (resources.files("bivlm.numerics") / "trellis_codes" / f"{state_bits}-{rate}.bin").read_bytes()
        code = trellis_code(state_bits, rate)
        tables = 2 if rate < 1 else 1
        assert len(content) == 4 * 9 + tables * (1 << state_bits) // 2
        assert to_bytes(code) == to_bytes(from_bytes(content, state_bits, rate)) == content
        assert (np.diff(code.magnitudes) > 0).all() and code.magnitudes[0] > 0
        assert np.bincount(code.table.ravel(), minlength=16).min() > 0
        count = {14: 60, 16: 16}[state_bits]
        x = gaussian(count, 256, seed=8)
        found = squared_error(x, searched(x, code), code).mean() / 256
        assert found == pytest.approx(code.error, rel=0.05 if state_bits == 16 else 0.03)

    def test_more_bits_and_more_states_err_less(self):
        for state_bits in STATE_BITS:
            errors = [trellis_code(state_bits, rate).error for rate in RATES]
            assert errors == sorted(errors, reverse=True)
        assert all(trellis_code(14, rate).error < trellis_code(12, rate).error for rate in RATES)
        assert all(trellis_code(16, rate).error < trellis_code(14, rate).error for rate in RATES if rate > 1)

    def test_no_file_is_of_another_code(self):
        names = {file.name for file in (resources.files("bivlm.numerics") / "trellis_codes").iterdir()}
        assert names == {f"{state_bits}-{rate}.bin" for state_bits, rate in FREE_CODES}

    def test_codes_are_part_of_the_format(self):
        found = {}
        for state_bits, rate in CODES:
            code = trellis_code(state_bits, rate)
            found[state_bits, rate] = hashlib.sha256(code.magnitudes.tobytes() + code.table.tobytes()).hexdigest()[:16]
        assert found == CODE_HASHES

    @pytest.mark.parametrize(("state_bits", "rate"), [(13, 2.0), (12, 2.1), (12, 0.25), (12, 3.25), (15, 2.0)])
    def test_another_code_is_refused(self, state_bits, rate):
        with pytest.raises(InputError, match=rf"{state_bits} state bits, rate {rate}: expected \(12, 14, 16\)"):
            trellis_code(state_bits, rate)

    @pytest.mark.parametrize("rate", RATES)
    def test_a_pattern_has_its_rate_and_begins_with_bits(self, rate):
        bits = pattern(rate)
        assert sum(bits) == 4 * rate and bits[0] > 0
        assert max(bits) - min(bits) <= 1
        for length in range(1, 30):
            assert bits_of(rate, np.array([length]))[0] == steps_of(rate, length).sum()
            assert 0 <= steps_of(rate, length).sum() - rate * length < 1


def drawn_symbols(rng, lengths, rate):
    steps = np.concatenate([steps_of(rate, length) for length in lengths])
    return (rng.integers(0, 8, len(steps)) & ((1 << steps) - 1)).astype(np.uint8)


LENGTHS = st.lists(st.one_of(st.integers(1, 90), st.integers(200, 300)), min_size=1, max_size=8)


class TestBits:
    @settings(max_examples=60, deadline=None)
    @given(lengths=LENGTHS, code=st.sampled_from(CODES), native=st.booleans(), seed=st.integers(0, 999))
    def test_what_is_written_is_read_as_text_says(self, lengths, code, native, seed):
        state_bits, rate = code
        symbols = drawn_symbols(np.random.default_rng(seed), lengths, rate)
        texts, levels, at = [], [], 0
        for length in lengths:
            texts.append(as_text(symbols[at : at + length], rate))
            levels += levels_by_text(texts[-1], length, trellis_code(*code))
            at += length
        text = "".join(texts)
        stream = write(symbols, np.array(lengths), rate)
        padded = text + "0" * (-len(text) % 8)
        assert stream.tobytes() == int(padded, 2).to_bytes(len(padded) // 8, "big")
        with pytest.MonkeyPatch.context() as patch:
            if not native:
                patch.setattr(kernels, "native", lambda: None)
            found = read(stream, np.array(lengths), trellis_code(state_bits, rate))
        assert found.tolist() == levels
        assert [len(text) for text in texts] == bits_of(rate, np.array(lengths)).tolist()

    @settings(max_examples=40, deadline=None)
    @given(length=st.integers(1, 200), code=st.sampled_from(CODES), seed=st.integers(0, 999))
    def test_the_levels_of_symbols_are_those_of_their_bits(self, length, code, seed):
        rng, code = np.random.default_rng(seed), trellis_code(*code)
        symbols = np.stack([drawn_symbols(rng, [length], code.rate) for _ in range(3)])
        expected = [levels_by_text(as_text(row, code.rate), length, code) for row in symbols]
        assert level_indices(symbols, code).tolist() == expected

    def test_few_bytes_at_a_time_are_read_alike(self, monkeypatch):
        lengths, code = np.array([70] * 9 + [65] * 4), trellis_code(12, 1.75)
        stream = write(drawn_symbols(np.random.default_rng(0), lengths, 1.75), lengths, 1.75)
        expected = read(stream, lengths, code)
        monkeypatch.setattr(kernels, "native", lambda: None)
        monkeypatch.setattr(trellis, "_TOGETHER_READ", 150)
        assert np.array_equal(read(stream, lengths, code), expected)


EXTREMES = [0.0, -0.0, 1e-45, -1e-40, 0.5, -3.0, 3.9, -4.1, 1e4, -1e20, 3.4e38, -3.4e38]
NUMBERS = st.one_of(st.floats(-4, 4, width=32), st.sampled_from(EXTREMES))
WEIGHTS = st.one_of(st.floats(0.125, 4, width=32), st.sampled_from([0.0, 1e-30, 16.0, 100.0, 1e6, 1e30]))


@needs_native
class TestNativeSearch:
    @settings(max_examples=50, deadline=None)
    @given(
        values=st.lists(NUMBERS, min_size=1, max_size=80),
        weights=st.none() | st.lists(WEIGHTS, min_size=80, max_size=80),
        further=st.integers(0, 60),
        code=st.sampled_from([each for each in CODES if each[0] == 12] * 6 + [(14, 1.25), (14, 3.0), (16, 0.75)]),
        scale=st.sampled_from([1.0, 1.0, 0.3]),
    )
    def test_it_finds_the_paths_that_numpy_finds(self, values, weights, further, code, scale):
        check_alike(values, weights, further, code, scale)

    def test_it_finds_them_where_no_path_is_cheap(self):
        """Costs that reach the largest number: ties between what is not reached and what is given up."""
        for rate, weight in itertools.product((0.5, 1.0, 2.0), (100.0, 1e6)):
            check_alike([3.4e38, -3.4e38] * 35, [weight] * 80, 3, (12, rate), 1.0)
            check_alike([3.4e38, -3.4e38] * 3, [weight] * 80, 0, (12, rate), 1.0)
            check_alike([0.5] * 75 + [3.4e38], [1.0] * 75 + [weight], 0, (12, rate), 1.0)

    @pytest.mark.parametrize("rows", [1, 3])
    def test_numpy_finds_them_few_at_a_time(self, rows, monkeypatch):
        code, x = trellis_code(12, 1.5), gaussian(3, 70, seed=9)
        expected = searched(x, code)
        monkeypatch.setattr(kernels, "native", lambda: None)
        monkeypatch.setattr(trellis, "_TOGETHER", rows * 70 << 11)
        assert np.array_equal(searched(x, code), expected)


def check_alike(values, weights, further, code, scale):
    code = trellis_code(*code)
    x = np.concatenate([np.array(values, np.float32), gaussian(further, seed=len(values))])[None]
    w = None if weights is None else np.resize(np.array(weights, np.float32), x.shape)
    levels = levels_of(code.magnitudes * np.float32(scale))
    native, native_indices = search(x, code, levels, w)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "native", lambda: None)
        symbols, indices = search(x, code, levels, w)
    assert np.array_equal(symbols, native) and np.array_equal(indices, native_indices)


CODE_HASHES = {
    (12, 0.5): "41cabbd11179a4d4",
    (12, 0.75): "846658374210d6f1",
    (12, 1.0): "6e3a3632667d5596",
    (12, 1.25): "8e2eae25afc6c73b",
    (12, 1.5): "aaf6fdf59d76698f",
    (12, 1.75): "96888ab6cac01099",
    (12, 2.0): "a07498c84082d743",
    (12, 2.25): "8273fc13d417b448",
    (12, 2.5): "2acb64f97f53b45c",
    (12, 2.75): "07fd215f6333ce30",
    (12, 3.0): "6b686fe658503079",
    (14, 0.5): "791251553d4229f8",
    (14, 0.75): "9cb6e165659542db",
    (14, 1.0): "493cf351e9ecec4c",
    (14, 1.25): "1b67a21578ec9fca",
    (14, 1.5): "df42e757a4284a3d",
    (14, 1.75): "b759ea4bb43db275",
    (14, 2.0): "01da5b9cc61c5a37",
    (14, 2.25): "1814ba38e049e3c1",
    (14, 2.5): "7e78067bde06c68e",
    (14, 2.75): "10ad2e276171d1ad",
    (14, 3.0): "471b0cfb8903a38d",
    (16, 0.5): "ae6a920098e9a41b",
    (16, 0.75): "f9ada4da19f42bba",
    (16, 1.0): "16dfe8cf3fe3d193",
    (16, 1.25): "39cd2ee5c94153fd",
    (16, 1.5): "8461cc7853f3795b",
    (16, 1.75): "fc331608fcfda237",
    (16, 2.0): "554d58f21d9c8bc7",
    (16, 2.25): "7740ad895779c89b",
    (16, 2.5): "4b7c773b3c33108b",
    (16, 2.75): "20de40c0b7d90c25",
    (16, 3.0): "75685e1ec7bf0c3f",
}
