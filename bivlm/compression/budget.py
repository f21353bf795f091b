"""Choose the settings of each layer so that the whole model stays within a budget of stored bits.

Every layer offers choices, each with its stored bits and its predicted error (`bivlm.methods.base.Method.curve`). The
sum of ``importance * error`` over the layers is made small under ``sum bits * weights <= budget * sum weights``. On the
lower convex hull of each layer's choices the gain per bit falls, so that taking the steppest steps first is optimal
for every budget that is met exactly (Shoham and Gersho, "Efficient bit allocation for an arbitrary set of quantizers",
1988); what is left of the budget then goes to whatever still fits.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from bivlm.errors import InputError
from bivlm.methods.base import CurvePoint


@dataclass(frozen=True)
class Choices:
    """One layer: how many weights it has, how much its relative error counts, and what it may be given."""

    weights: int
    importance: float
    points: Sequence[CurvePoint]


def importance(mean: float, std: float, factor: float) -> float:
    """Return what a relative squared error of 1 in a layer costs: the mean square of its weights times `factor`.

    The factor is the number of weights, or the sum of the curvature's diagonal, see
    `bivlm.recipe.budget.BudgetSettings`.
    """
    return (mean**2 + std**2) * factor


def allocate(layers: Mapping[str, Choices], budget: float, least: float | None = None) -> dict[str, CurvePoint]:
    """Return the choice for every layer, by name; `budget` is in stored bits per weight over all of them.

    Choices of fewer than `least` bits are left out, except for a layer that has no other. Raises `InputError` naming a
    layer without choices, and for a budget below the cheapest choices together.
    """
    layers = {name: replace(layer, points=_from(layer.points, least)) for name, layer in layers.items()}
    for name, layer in layers.items():
        if not layer.points:
            raise InputError(f"budget: {name}: its method leaves no choice of bits; leave the budget out for it")
    total = sum(layer.weights for layer in layers.values())
    hulls = {name: lower_hull(layer.points) for name, layer in layers.items()}
    taken = dict.fromkeys(layers, 0)
    spent = sum(hulls[name][0].stored_bits * layer.weights for name, layer in layers.items())
    allowed = budget * total * (1 + 1e-12)  # sums of bits round
    if spent > allowed:
        raise InputError(
            f"budget.bits: found {budget:g}, expected at least {spent / total:.4f}, what the cheapest choices take"
        )
    steps: list[tuple[float, str]] = []

    def offer(name: str) -> None:
        hull, place = hulls[name], taken[name]
        if place + 1 < len(hull):
            gain = (hull[place].error - hull[place + 1].error) * layers[name].importance
            cost = (hull[place + 1].stored_bits - hull[place].stored_bits) * layers[name].weights
            heapq.heappush(steps, (-gain / cost, name))

    for name in layers:
        offer(name)
    while steps:
        _, name = heapq.heappop(steps)
        hull, place = hulls[name], taken[name]
        cost = (hull[place + 1].stored_bits - hull[place].stored_bits) * layers[name].weights
        if spent + cost <= allowed:
            spent += cost
            taken[name] += 1
            offer(name)
    return {name: hulls[name][place] for name, place in taken.items()}


def _from(points: Sequence[CurvePoint], least: float | None) -> Sequence[CurvePoint]:
    return [point for point in points if least is None or point.stored_bits >= least] or points


def lower_hull(points: Sequence[CurvePoint]) -> list[CurvePoint]:
    """Return the points on the lower convex hull of (bits, error), by rising bits and falling error."""
    hull: list[CurvePoint] = []
    for point in sorted(points, key=lambda each: (each.stored_bits, each.error)):
        if hull and point.error >= hull[-1].error:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], point):
            hull.pop()
        if hull and hull[-1].stored_bits == point.stored_bits:
            hull.pop()
        hull.append(point)
    return hull


def _slope(one: CurvePoint, other: CurvePoint) -> float:
    """Return the change of the error per bit, from `one` to the dearer `other`; negative."""
    return (other.error - one.error) / (other.stored_bits - one.stored_bits)
