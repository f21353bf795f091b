"""Random rotations against dense matrices: orthogonal, the same on every machine, and they spread what stands out."""

import numpy as np
import pytest
import torch
from dense_rotation import dense_rotation, signs_of, turned
from scipy.stats import kurtosis

from bivlm import kernels
from bivlm.numerics import hadamard
from bivlm.numerics.hadamard import matrix_rotation, rotate, rotate_back, rotate_moment

WIDTHS = [1, 2, 3, 127, 128, 1152, 3420, 4304]


def drawn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("width", WIDTHS)
def test_it_is_signs_and_two_overlapping_hadamard_transforms(width):
    x = drawn(4, width)
    assert np.abs(rotate(x, 5).numpy() - turned(x.double().numpy().T, 5).T).max() < 1e-5


@pytest.mark.parametrize("width", [1, 2, 3, 127, 128])
def test_its_matrix_is_orthogonal(width):
    rotation = rotate(torch.eye(width), 6).numpy().T
    assert np.abs(rotation @ rotation.T - np.eye(width)).max() < 1e-6
    assert np.abs(rotation - dense_rotation(width, 6)).max() < 1e-6


@pytest.mark.parametrize("width", WIDTHS)
def test_it_keeps_lengths_and_angles_and_is_undone(width):
    x = drawn(4, width)
    found = rotate(x, 1)
    assert torch.allclose(found @ found.T, x @ x.T, atol=1e-6 * width)
    assert torch.allclose(rotate_back(found, 1), x, atol=1e-5)
    assert torch.allclose(rotate(rotate_back(x, 1), 1), x, atol=1e-5)


@pytest.mark.parametrize("width", [1, 3, 64, 127, 200])
def test_a_moment_is_rotated_as_the_vectors_that_it_is_of(width):
    x, rotation = drawn(300, width).double().numpy(), dense_rotation(width, 9)
    moment = x.T @ x / 300
    found = rotate_moment(torch.from_numpy(moment).float(), 9).numpy()
    assert np.abs(found - rotation @ moment @ rotation.T).max() < 1e-5
    assert np.abs(found - (x @ rotation.T).T @ (x @ rotation.T) / 300).max() < 1e-5


@pytest.mark.parametrize("turn", [rotate, rotate_back])
def test_batches_views_and_other_dtypes_give_what_their_rows_give(turn):
    x = drawn(2, 3, 150)
    whole = turn(x, 2)
    assert whole.shape == x.shape
    rows = torch.stack([turn(row, 2) for row in x.reshape(6, 150)])
    assert torch.equal(whole.reshape(6, 150), rows)
    spaced = torch.stack([x, -x], -1).reshape(2, 3, 300)[..., ::2]
    assert torch.equal(turn(spaced, 2), whole)
    assert torch.equal(turn(x[0].T.contiguous().T, 2), whole[0])
    assert torch.equal(turn(x.bfloat16(), 2), turn(x.bfloat16().float(), 2))
    assert torch.equal(turn(x.double(), 2), whole)
    assert turn(x.double(), 2).dtype == torch.float32


@pytest.mark.parametrize("turn", [rotate, rotate_back])
@pytest.mark.parametrize("width", [64, 100])
def test_what_is_given_is_left_as_it_was(turn, width):
    x = drawn(5, width)
    before = x.clone()
    turn(x, 3)
    assert torch.equal(x, before)


@pytest.mark.parametrize("turn", [rotate, rotate_back])
def test_neither_threads_nor_parts_change_a_bit(turn, monkeypatch):
    x = drawn(800, 192)
    before, expected = torch.get_num_threads(), turn(x, 4)
    monkeypatch.setattr(kernels, "native", lambda: None)
    try:
        torch.set_num_threads(2)
        assert torch.equal(turn(x, 4), expected)
    finally:
        torch.set_num_threads(before)
    monkeypatch.setattr(hadamard, "_TOGETHER", 7 * 192)
    assert torch.equal(turn(x, 4), expected)


@pytest.mark.skipif(kernels.native() is None, reason="the native code was not built")
@pytest.mark.parametrize("width", [1, 2, 4, 8, 16, 31, 64, 100, 1152])
def test_native_code_gives_the_bytes_that_torch_gives(width, monkeypatch):
    x = drawn(9, width)
    native = [rotate(x, 7), rotate_back(x, 7)]
    monkeypatch.setattr(kernels, "native", lambda: None)
    assert all(map(torch.equal, [rotate(x, 7), rotate_back(x, 7)], native))


@pytest.mark.parametrize("width", WIDTHS)
def test_products_with_matrices_turn_as_it_does(width):
    x = drawn(5, width, seed=3)
    before = x.clone()
    turning = matrix_rotation(width, 9, torch.device("cpu"))
    for back, expected in ((False, rotate(x, 9)), (True, rotate_back(x, 9))):
        torch.testing.assert_close(turning.apply(x, back=back), expected, rtol=0, atol=1e-5)
    assert torch.equal(x, before)


def test_signs_are_part_of_the_format():
    def said(width, seed):
        signs = rotate(torch.eye(width), seed)[:, 0]  # the transforms' first row is positive
        return "".join("-" if sign < 0 else "+" for sign in signs)

    assert said(32, 0) == "--+++--+--++-+-+++++--+++--+---+"
    assert said(32, 1) == "+--+++--+---+-++-++-+-+-+++++-+-"
    assert said(32, 2**32 - 1) == "-+-+-------+----++-+++++-+-++++-"
    rotation = rotate(torch.eye(3), 0).T
    assert (4 * rotation.square() * rotation.sign()).round().tolist() == [[-2, -2, 0], [1, -1, 2], [1, -1, -2]]


def test_seeds_and_widths_have_signs_of_their_own():
    first, second = signs_of(1152, 0)
    for other in (np.ones(1152), signs_of(1152, 1)[0], np.resize(signs_of(1151, 0)[0], 1152), np.resize(second, 1152)):
        assert abs((first * other).mean()) < 0.1


@pytest.mark.parametrize("width", [1152, 3420, 4304])
@pytest.mark.parametrize("where", ["first", "last", "anywhere"])
def test_channels_that_stand_out_are_spread_over_all(width, where):
    """A Gaussian's kurtosis is 3: a grid for Gaussians then suits every entry."""
    weight = drawn(64, width)
    places = {"first": torch.arange(6), "last": torch.arange(width - 6, width), "anywhere": torch.arange(6) * 97 + 11}
    weight[:, places[where]] *= 30
    assert kurtosis(weight.numpy().ravel(), fisher=False) > 300
    assert kurtosis(rotate(weight, 0).numpy().ravel(), fisher=False) < 4
