"""Choose settings of layers by the outputs of whole blocks, together where blocks depend on each other.

The error of a layer's own weight or output does not show its effect on the layers behind it. Q-VLM (arXiv 2410.08119)
measures how strongly neighbours depend on each other by the entropy of the activations between them, joins neighbours
whose dependency exceeds a threshold, three at most, and chooses how to round within such a group by the error of the
group's output.

Here the neighbours are the units of `bivlm.calibration.blocks.units`, mostly transformer blocks; the threshold is the
mean over all neighbours of the model; and what is chosen is any setting of any method, for weights alone. A group is
searched by coordinate descent: layer by layer in order, each over its candidates with all others fixed, starting from
every layer's first candidate. The group's output is compared with that of its full-precision weights on the same
inputs. Behind quantized blocks these inputs differ from those in the full-precision model; compared with the latter, a
group is chosen for errors that are not its own (reference model, two bits: KL 0.77 instead of 0.42).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from bivlm.calibration.blocks.encoded import Samples, outputs_at, stack
from bivlm.calibration.blocks.model import BlockwiseModel
from bivlm.calibration.blocks.run import run_unit
from bivlm.calibration.blocks.units import Unit
from bivlm.compression.layer import pack_layer
from bivlm.methods import method
from bivlm.methods.base import MethodSettings
from bivlm.numerics.weight_statistics import LayerStatistics
from bivlm.packing import unpack

LEVELS = 256
# Levels span this many standard deviations either side of the mean. Between the extremes, which a few outliers set in
# every large language model, nearly all activations would share a handful of levels.
SPAN = 4.0

Outputs = Samples  # what `stack` makes of a unit's outputs, or the file written of it
Rebuild = Callable[[str, int], torch.Tensor]


@dataclass(frozen=True)
class Found:
    """The result of searching a group.

    Attributes:
        chosen: by linear layer, which of its candidates.
        error_before, error_after: ``||Y_q - Y||^2 / ||Y||^2`` of the group's output over all samples, with each
            layer's first candidate and with those that were chosen.
        tried: for how many choices the error was measured.
        outputs: by unit, what it gives with the chosen candidates.
    """

    chosen: dict[str, int]
    error_before: float
    error_after: float
    tried: int
    outputs: dict[str, Outputs]


def activation_entropy(outputs: Sequence[torch.Tensor]) -> float:
    """Return ``-sum_l p_l ln p_l`` in nats, p_l the share of activations at level l of 256; 0 without activations.

    Levels are equally spaced from ``mean - 4 std`` to ``mean + 4 std`` over all `outputs` (any shapes) together; the
    outermost take what lies beyond. The entropy is that of the shape: a shift or a factor does not change it.
    """
    size = sum(output.numel() for output in outputs)
    if size == 0:
        return 0.0
    mean = sum(float(output.sum(dtype=torch.float64)) for output in outputs) / size
    std = math.sqrt(sum(float((output.to(torch.float64) - mean).square_().sum()) for output in outputs) / size)
    if std == 0:
        return 0.0
    counts_L = torch.zeros(LEVELS, dtype=torch.float64)
    for output in outputs:
        place = (output.to(torch.float64).reshape(-1) - mean) / std
        level = ((place + SPAN) * (LEVELS / (2 * SPAN))).floor_().clamp_(0, LEVELS - 1)
        counts_L += torch.bincount(level.to(torch.int64).cpu(), minlength=LEVELS)
    p_L = counts_L[counts_L > 0] / size
    return -float((p_L * p_L.log()).sum())


def dependencies(units: Sequence[Unit], entropy: Mapping[str, float]) -> list[float | None]:
    """Return how strongly each unit but the first depends on the one before it: the entropy of what passes between.

    None where nothing passes: between components, and between adaptors, each of which reads the vision model.
    """
    return [
        entropy[one.name] if one.component == other.component != "adaptor" else None
        for one, other in itertools.pairwise(units)
    ]


def mean_dependency(between: Sequence[float | None]) -> float:
    """Return the threshold: the mean of the known dependencies, 0 without any."""
    known = [each for each in between if each is not None]
    return math.fsum(known) / len(known) if known else 0.0


def joint_groups(
    units: Sequence[Unit], between: Sequence[float | None], threshold: float, depth: int = 3
) -> list[list[Unit]]:
    """Return all units in their order, grouping neighbours whose dependency exceeds `threshold`, at most `depth`.

    `between` is the result of `dependencies`.
    """
    groups: list[list[Unit]] = []
    for unit, dependency in zip(units, [None, *between], strict=False):
        if dependency is not None and dependency > threshold and len(groups[-1]) < depth:
            groups[-1].append(unit)
        else:
            groups.append([unit])
    return groups


def as_stored(
    weight_MN: torch.Tensor, statistics: LayerStatistics, settings: MethodSettings, name: str = "weight"
) -> torch.Tensor:
    """Return the weight (M, N) as `settings` would store it: planned, packed and rebuilt."""
    plan = method(settings.method).plan(statistics, settings)
    packed, _ = pack_layer(weight_MN, plan, name)
    return unpack(packed, name)


def relative_output_error(found: Outputs, target: Outputs, samples: int) -> float:
    """Return ``||Y_q - Y||^2 / ||Y||^2`` over the first `samples`, in float64; 0 if Y is zero or the unit never ran."""
    lost = total = 0.0
    for number in range(samples):
        y_q, y = (outputs_at({"y": outputs}, number).get("y") for outputs in (found, target))
        if y is None or y_q is None:
            continue
        y = y.to(torch.float64)
        total += float(y.square().sum())
        lost += float((y_q.to(torch.float64) - y).square_().sum())
    return lost / total if total > 0 else 0.0


def search_group(
    model: BlockwiseModel,
    units: Sequence[Unit],
    samples: Sequence[Mapping[str, torch.Tensor]],
    given: Mapping[str, Outputs],
    candidates: Mapping[str, int],
    rebuild: Rebuild,
    rounds: int = 1,
) -> Found:
    """Search the layers of the consecutive `units` for candidates that make the error of the last output small.

    `given` are the outputs of the units before by name. `candidates` is the number of candidates by linear layer;
    ``rebuild(layer, candidate)`` returns the weight (M, N) as it would be stored. Of equally good candidates the first
    is chosen. In memory are the weights of the group's layers, one more, and the activations between its units.
    Raises ArithmeticError if a unit returns NaN or infinity.
    """
    weights = {name: rebuild(name, 0) for unit in units for name in unit.linears if name in candidates}
    chosen, tried = dict.fromkeys(weights, 0), 0

    def run(unit: Unit, found: Mapping[str, Outputs], weights: Mapping[str, torch.Tensor]) -> Outputs:
        before = {other.name: found[other.name] for other in model.predecessors(unit)}
        own = {name: weights[name] for name in unit.linears if name in weights}
        return stack(run_unit(model, unit, samples, before, weigh=None, weights=own).outputs)

    def last(first: int, found: Mapping[str, Outputs], weights: Mapping[str, torch.Tensor]) -> Outputs:
        found = dict(found)
        for unit in units[first:]:
            found[unit.name] = run(unit, found, weights)
        return found[units[-1].name]

    def error(first: int, found: Mapping[str, Outputs], weights: Mapping[str, torch.Tensor]) -> float:
        nonlocal tried
        tried += 1
        return relative_output_error(last(first, found, weights), target, len(samples))

    target = last(0, given, {})
    best = error_before = error(0, given, weights)
    for _ in range(rounds):
        found = dict(given)
        for at, unit in enumerate(units):
            for name in filter(weights.__contains__, unit.linears):
                now = chosen[name]
                for candidate in range(candidates[name]):
                    if candidate == now:  # its error is the best so far
                        continue
                    weight = rebuild(name, candidate)
                    lost = error(at, found, weights | {name: weight})
                    if (lost, candidate) < (best, chosen[name]):
                        best, chosen[name], weights[name] = lost, candidate, weight
            found[unit.name] = run(unit, found, weights)
    return Found(chosen, error_before, best, tried, {unit.name: found[unit.name] for unit in units})
