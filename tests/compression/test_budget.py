"""Bits across layers against every possible choice."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bivlm.compression.budget import Choices, allocate, lower_hull
from bivlm.errors import InputError
from bivlm.methods.base import CurvePoint


def point(bits, error):
    return CurvePoint({"bits": bits}, bits, error)


POINTS = st.lists(st.tuples(st.integers(1, 12), st.integers(0, 50)), min_size=1, max_size=5, unique=True)
LAYERS = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9), POINTS), min_size=1, max_size=4)


def layers_of(drawn):
    return {
        f"layer {number}": Choices(weights, importance, [point(*each) for each in points])
        for number, (weights, importance, points) in enumerate(drawn)
    }


def cost_of(layers, chosen):
    total = sum(layer.weights for layer in layers.values())
    bits = sum(chosen[name].stored_bits * layer.weights for name, layer in layers.items()) / total
    return bits, sum(chosen[name].error * layer.importance for name, layer in layers.items())


def all_choices(layers):
    for points in itertools.product(*(layer.points for layer in layers.values())):
        yield cost_of(layers, dict(zip(layers, points, strict=True)))


@given(LAYERS, st.floats(0, 1))
def test_no_choice_of_as_many_bits_as_were_spent_is_better(drawn, share):
    """What is spent is spent optimally as long as no step was left out for want of bits."""
    layers = layers_of(drawn)
    found = sorted(all_choices(layers))
    budget = found[0][0] + share * (found[-1][0] - found[0][0])
    bits, lost = cost_of(layers, allocate(layers, budget))
    assert bits <= budget + 1e-9
    # At least as good as the best choice that costs one step less: the classical bound of the greedy method.
    largest = max(
        (b.stored_bits - a.stored_bits) * layer.weights
        for layer in layers.values()
        for a, b in itertools.product(layer.points, layer.points)
    ) / sum(layer.weights for layer in layers.values())
    assert all(lost <= other + 1e-9 for spent, other in found if spent <= budget - largest)


@given(LAYERS)
def test_a_budget_for_everything_takes_the_best_of_everything(drawn):
    layers = layers_of(drawn)
    _, lost = cost_of(layers, allocate(layers, 100.0))
    assert lost == min(other for _, other in all_choices(layers))


@given(POINTS)
def test_the_hull_is_convex_and_below_every_point(drawn):
    points = [point(*each) for each in drawn]
    hull = lower_hull(points)
    for one, two, three in zip(hull, hull[1:], hull[2:], strict=False):
        middle = one.error + (three.error - one.error) * (two.stored_bits - one.stored_bits) / (
            three.stored_bits - one.stored_bits
        )
        assert two.error < middle
    for each in points:
        below = [h for h in hull if h.stored_bits <= each.stored_bits]
        above = [h for h in hull if h.stored_bits >= each.stored_bits]
        if not above:
            assert each.error >= hull[-1].error
        elif below:
            a, b = below[-1], above[0]
            share = 0 if a is b else (each.stored_bits - a.stored_bits) / (b.stored_bits - a.stored_bits)
            assert each.error >= a.error + share * (b.error - a.error) - 1e-9


def test_bits_go_where_they_matter():
    points = [point(1, 0.36), point(2, 0.12), point(3, 0.03)]
    layers = {"much": Choices(100, 50.0, points), "little": Choices(100, 1.0, points)}
    chosen = allocate(layers, 2.0)
    assert (chosen["much"].stored_bits, chosen["little"].stored_bits) == (3, 1)


def test_a_budget_that_nothing_meets_is_refused_with_the_least():
    layers = {"a": Choices(10, 1.0, [point(1.5, 0.1)])}
    with pytest.raises(InputError, match=r"budget\.bits: found 1, expected at least 1\.5000"):
        allocate(layers, 1.0)
    with pytest.raises(InputError, match="b: its method leaves no choice"):
        allocate({"b": Choices(10, 1.0, [])}, 1.0)
