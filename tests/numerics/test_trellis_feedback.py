"""Error feedback on a trellis, seen from the rebuilt weight: what it saves, and that every tile was given what it had
to be given."""

import numpy as np
import pytest
from dense_rotation import dense_rotation

from bivlm import kernels
from bivlm.numerics.trellis import levels_of, read, search, trellis_code, write
from bivlm.numerics.trellis_feedback import one_sided, two_sided
from bivlm.numerics.trellis_tiles import Tiles

CODE = trellis_code(12, 2.0)
LEVELS = levels_of(CODE.magnitudes)
needs_native = pytest.mark.skipif(kernels.native() is None, reason="the native code was not built")


def gaussian(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def moment(size, seed):
    """A second moment of inputs that partly lie in a few directions, float64."""
    few = max(1, size // 4)
    x = gaussian(4 * size, few, seed=seed) @ gaussian(few, size, seed=seed + 1) / few**0.5
    x += 0.5 * gaussian(4 * size, size, seed=seed + 2)
    found = x.astype(np.float64).T @ x / len(x)
    return found + 0.01 * found.trace() / size * np.eye(size)


def neighbours(size):
    """The second moment, rotated, of inputs that are each like the one before."""
    rotation = dense_rotation(size, 3)
    return rotation @ 0.85 ** np.abs(np.arange(size)[:, None] - np.arange(size)) @ rotation.T


class Side:
    """N and 1 / U_jj^2 of a moment ``H = (U^T U)^-1``, in float64."""

    def __init__(self, moment):
        self.moment = moment
        upper = np.linalg.cholesky(np.linalg.inv(moment)).T
        self.shares = upper / upper.diagonal()[:, None]
        self.remains = 1 / upper.diagonal() ** 2

    @property
    def shares32(self):
        return np.ascontiguousarray(self.shares, np.float32)

    @property
    def importance32(self):
        return (self.remains / self.remains.mean()).astype(np.float32)


def rebuilt(symbols, shape, sides, code=CODE):
    tiles = Tiles(shape, sides)
    stream = read(write(symbols, tiles.lengths, code.rate), tiles.lengths, code)
    return levels_of(code.magnitudes)[tiles.matrix(stream)].astype(np.float64)


def both(weight, outputs, inputs, code=CODE):
    given = (outputs.shares32, inputs.shares32, outputs.importance32, inputs.importance32)
    return two_sided(weight, *given, code, levels_of(code.magnitudes))


def groups_of(shape, sides):
    """Which weights are searched before any of their errors is fed on: a number by element, in turn."""
    tiles = Tiles(shape, sides)
    groups = tiles.diagonal_groups
    sizes = tiles.lengths if sides == 1 else [sum(tiles.pieces(*group)) for group in groups]
    return tiles.matrix(np.repeat(np.arange(len(sizes)), sizes))


def given_to(weight, left, outputs, inputs, sides):
    """What each element was to be quantized to, in float64: the formula of the docstring, F being `left`."""
    group, wanted = groups_of(weight.shape, sides), weight.astype(np.float64)
    through = left @ inputs
    for i, j in np.ndindex(weight.shape):
        earlier = group[i, :j] < group[i, j]
        wanted[i, j] -= left[i, :j][earlier] @ inputs[:j, j][earlier]
        if outputs is not None:
            earlier = group[:i, j] < group[i, j]
            wanted[i, j] -= outputs[:i, i][earlier] @ through[:i, j][earlier]
    return wanted


def check_each_search(wanted, weights, rebuilt, sides):
    """Every tile is about as near to what was wanted as another search for that finds it."""
    tiles, shape = Tiles(wanted.shape, sides), wanted.shape
    order = np.argsort(tiles.matrix(np.arange(wanted.size)), axis=None)
    begins = np.cumsum(tiles.lengths) - tiles.lengths
    found, again = 0.0, 0.0
    for begin, length in zip(begins, tiles.lengths, strict=True):
        at = np.unravel_index(order[begin : begin + length], shape)
        weight = weights[at] / weights[at].mean()
        symbols = search(wanted[at][None].astype(np.float32), CODE, LEVELS, weight[None].astype(np.float32))[0][0]
        stream = read(write(symbols, np.array([length]), CODE.rate), np.array([length]), CODE)
        found += (weights[at] * np.square(wanted[at] - rebuilt[at])).sum()
        again += (weights[at] * np.square(wanted[at] - LEVELS[stream])).sum()
    assert found == pytest.approx(again, rel=2e-3)


@pytest.mark.parametrize("shape", [(70, 150), (300, 20), (60, 130), (33, 200), (5, 150), (1, 90), (64, 1)])
def test_one_sided_tiles_were_given_the_weight_less_what_was_left_before(shape):
    """``E = F N``: the identity, and that F is what each column's quantization left of ``W - F (N - I)``."""
    weight, side = gaussian(*shape, seed=2), Side(moment(shape[1], 3))
    found = rebuilt(one_sided(weight, side.shares32, CODE, LEVELS), shape, 1)
    error = weight - found
    left = error @ np.linalg.inv(side.shares)
    assert np.trace(error @ side.moment @ error.T) == pytest.approx((np.square(left) * side.remains).sum())
    wanted = given_to(weight, left, None, side.shares, 1)
    if shape[0] >= 64:  # tiles of single columns: all that is left is fed on
        assert np.abs(wanted - found - left).max() < 1e-9
    check_each_search(wanted, np.ones(shape), found, 1)


@pytest.mark.parametrize("shape", [(70, 90), (20, 130), (130, 140), (140, 9), (1, 90), (90, 1), (3, 5)])
def test_two_sided_tiles_were_given_the_weight_less_what_was_left_on_both_sides(shape):
    """``E = N_G^T F N_H``: the identity, and that F is what the quantization of ``Q + F`` left."""
    weight, outputs, inputs = gaussian(*shape, seed=4), Side(moment(shape[0], 5)), Side(moment(shape[1], 7))
    found = rebuilt(both(weight, outputs, inputs), shape, 2)
    error = weight - found
    left = np.linalg.inv(outputs.shares).T @ error @ np.linalg.inv(inputs.shares)
    weights = np.outer(outputs.remains, inputs.remains)
    trace = np.trace(outputs.moment @ error @ inputs.moment @ error.T)
    assert trace == pytest.approx((np.square(left) * weights).sum())
    wanted = given_to(weight, left, outputs.shares, inputs.shares, 2)
    check_each_search(wanted, weights, found, 2)


@pytest.mark.parametrize("shape", [(256, 128), (160, 180)])
def test_feedback_saves_most_of_the_outputs_error(shape):
    weight, outputs, inputs = gaussian(*shape, seed=8), Side(neighbours(shape[0])), Side(neighbours(shape[1]))

    def errors(symbols, sides):
        error = weight - rebuilt(symbols, shape, sides)
        by_inputs = np.trace(error @ inputs.moment @ error.T)
        return by_inputs, np.trace(outputs.moment @ error @ inputs.moment @ error.T)

    plain = errors(one_sided(weight, None, CODE, LEVELS), 1)
    one = errors(one_sided(weight, inputs.shares32, CODE, LEVELS), 1)
    two = errors(both(weight, outputs, inputs), 2)
    assert one[0] < 0.4 * plain[0] and one[1] < 0.4 * plain[1]
    assert two[1] < 0.45 * one[1]
    # What is predicted: every number errs as a Gaussian's does.
    size = shape[0] * shape[1]
    assert one[0] == pytest.approx(CODE.error * size * inputs.remains.mean(), rel=0.2)
    assert two[1] == pytest.approx(CODE.error * size * inputs.remains.mean() * outputs.remains.mean(), rel=0.3)


def test_without_moments_the_weight_errs_as_a_gaussian():
    weight = gaussian(300, 60, seed=12)
    for symbols, sides in (
        (one_sided(weight, None, CODE, LEVELS), 1),
        (one_sided(weight, np.eye(60, dtype=np.float32), CODE, LEVELS), 1),
        (both(weight, Side(np.eye(300)), Side(np.eye(60))), 2),
    ):
        assert np.square(weight - rebuilt(symbols, weight.shape, sides)).mean() == pytest.approx(CODE.error, rel=0.03)
    nothing_fed = one_sided(weight, np.eye(60, dtype=np.float32), CODE, LEVELS)
    assert np.array_equal(nothing_fed, one_sided(weight, None, CODE, LEVELS))


def test_with_outputs_that_count_alike_two_sides_are_about_as_good_as_one():
    weight, inputs = gaussian(256, 128, seed=13), Side(neighbours(128))

    def error(symbols, sides):
        each = weight - rebuilt(symbols, weight.shape, sides)
        return np.trace(each @ inputs.moment @ each.T)

    two = error(both(weight, Side(np.eye(256)), inputs), 2)
    assert two == pytest.approx(error(one_sided(weight, inputs.shares32, CODE, LEVELS), 1), rel=0.1)


@pytest.mark.parametrize("shape", [(600, 70), (1000, 5)])
def test_threads_change_nothing(shape):
    weight, inputs = gaussian(*shape, seed=15), Side(moment(shape[1], 16))
    for shares in (inputs.shares32, None):
        one = one_sided(weight, shares, CODE, LEVELS, threads=1)
        assert np.array_equal(one_sided(weight, shares, CODE, LEVELS, threads=2), one)


@needs_native
@pytest.mark.parametrize(("shape", "rate"), [((66, 70), 2.0), ((40, 30), 0.75), ((7, 90), 1.5)])
def test_one_sided_bytes_are_numpys(shape, rate, monkeypatch):
    weight, inputs, code = gaussian(*shape, seed=17), Side(moment(shape[1], 18)), trellis_code(12, rate)
    given = (weight, inputs.shares32, code, levels_of(code.magnitudes))
    native = one_sided(*given)
    monkeypatch.setattr(kernels, "native", lambda: None)
    assert np.array_equal(one_sided(*given), native)


@needs_native
@pytest.mark.parametrize(("shape", "rate"), [((40, 50), 2.0), ((9, 100), 0.5)])
def test_two_sided_bytes_are_numpys(shape, rate, monkeypatch):
    weight, code = gaussian(*shape, seed=19), trellis_code(12, rate)
    given = (weight, Side(moment(shape[0], 20)), Side(moment(shape[1], 21)), code)
    native = both(*given)
    monkeypatch.setattr(kernels, "native", lambda: None)
    assert np.array_equal(both(*given), native)


@needs_native
@pytest.mark.parametrize(
    ("count", "block", "length"), [(1, 1, 1), (5, 3, 63), (9, 64, 64), (40, 17, 257), (0, 4, 8), (3, 0, 8)]
)
def test_rows_are_fed_alike_by_native_code_and_numpy(count, block, length, monkeypatch):
    rest, errors = gaussian(count, length, seed=22), gaussian(block, length, seed=23)
    shares = gaussian(block, count + 11, seed=24)[:, 5 : 5 + count]
    expected = rest.copy()
    for row in range(block):
        expected = expected - shares[row][:, None] * errors[row]
    kernels.feed_rows(rest_native := rest.copy(), shares, errors)
    monkeypatch.setattr(kernels, "native", lambda: None)
    kernels.feed_rows(rest, shares, errors)
    assert rest.tobytes() == rest_native.tobytes() == expected.tobytes()


def test_importances_of_any_size_leave_a_search():
    """Of most weights the product of both importances is zero in float32."""
    sides = [Side(np.diag([1.0] * 3 + [1e-25] * 60)) for _ in range(2)]
    weight = gaussian(63, 63, seed=25)
    error = weight - rebuilt(both(weight, *sides), (63, 63), 2)
    apart = np.add.outer(np.arange(63), np.arange(63)) > 70  # from weights that count
    assert np.square(error[apart]).mean() == pytest.approx(CODE.error, rel=0.1)


def test_an_array_that_is_not_contiguous_is_not_handed_to_native_code():
    with pytest.raises(ValueError, match=r"strides \(4, 12\)"):
        kernels.pointer(gaussian(2, 3).T)
