from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from tasks.layers import CHUNK_WEIGHTS, SMALLEST_CHUNK_WEIGHTS, Layer, in_chunks

SIZES = st.lists(st.integers(1, 2 * CHUNK_WEIGHTS), min_size=1, max_size=40)


def layers(sizes):
    return [Layer("", f"layer {i}", "", "vision", (size, 1), "", {}) for i, size in enumerate(sizes)]


@given(SIZES, st.integers(1, 8))
def test_chunks_hold_every_layer_once_and_in_order(sizes, workers):
    given_layers = layers(sizes)
    assert [layer for chunk in in_chunks(given_layers, workers) for layer in chunk] == given_layers


@given(SIZES, st.integers(1, 8))
def test_a_chunk_is_ten_seconds_of_work_or_one_large_layer(sizes, workers):
    for chunk in in_chunks(layers(sizes), workers):
        assert len(chunk) == 1 or sum(layer.weights for layer in chunk) <= CHUNK_WEIGHTS


@given(SIZES, st.integers(1, 8))
def test_neighbouring_chunks_would_not_fit_into_one(sizes, workers):
    chunks = in_chunks(layers(sizes), workers)
    for chunk, following in pairwise(chunks):
        together = sum(layer.weights for layer in chunk) + following[0].weights
        assert together > SMALLEST_CHUNK_WEIGHTS


def test_every_worker_has_something_to_do():
    assert len(in_chunks(layers([SMALLEST_CHUNK_WEIGHTS] * 8), workers=4)) == 4
