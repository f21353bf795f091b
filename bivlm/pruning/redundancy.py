"""Find how many image tokens a model can do without, at a loss of accuracy that is stated beforehand.

A share counts as shown if the 95 % interval of its loss stays within the tolerance, as refuted if it lies beyond it.
Between the largest that is shown and the smallest that is refuted the questions cannot tell.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from bivlm.evaluation.paired import Loss

Verdict = Literal["within", "beyond", "unclear"]

STEPS = 100  # shares are whole percents


@dataclass(frozen=True)
class Redundancy:
    """How many image tokens can be dropped.

    Attributes:
        shown: the largest share, among those looked at, whose loss is shown to be within the tolerance; None if there
            is none.
        refuted: the smallest whose loss is shown to be beyond it; None if there is none.
        losses: what was looked at, by share.
        tolerance: in percentage points.
        questions: how many were asked.
        needed: how many it would take, about, to tell about the share next to `shown`; None if that is known.
        resolved: whether no share that leaves a token is in doubt.
    """

    shown: float | None
    refuted: float | None
    losses: dict[float, Loss]
    tolerance: float
    questions: int
    needed: int | None
    resolved: bool

    def in_words(self) -> str:
        """Return one sentence for people."""
        within = f"within {self.tolerance:g} point{'' if self.tolerance == 1 else 's'}"
        if self.shown is None:
            start = f"no share is shown to stay {within}"
        else:
            start = f"{100 * self.shown:g} % of the image tokens can be dropped {within}"
        end = "" if self.refuted is None else f"; {100 * self.refuted:g} % cannot"
        if self.resolved:
            return f"{start}{end} ({self.questions} questions)"
        doubt = {
            (True, True): "; in between",
            (True, False): "; more is",
            (False, True): "; less is",
            (False, False): ":",
        }
        which = doubt[self.shown is not None, self.refuted is not None]
        return f"{start}{end}{which} not resolvable with {self.questions} questions" + (
            "" if self.needed is None else f" (about {self.needed:,} would be needed)"
        )


def verdict(loss: Loss, tolerance: float) -> Verdict:
    """Return what the questions say of a share's loss against the tolerance, both in percentage points."""
    if loss.high <= tolerance:
        return "within"
    return "beyond" if loss.low > tolerance else "unclear"


def find_redundancy(measure: Callable[[float], Loss | None], tolerance: float, highest: float = 0.99) -> Redundancy:
    """Bisect shares of whole percents up to `highest`; ``measure(share)`` prunes and compares with no pruning.

    It returns None for a share that leaves no token, which ends the range.
    It assumes that more pruning loses more; where that is not so, `shown` has larger shares above it that were not
    looked at. Each of the two ends takes some seven measurements, many of them shared.
    """
    found: dict[float, Loss | None] = {}

    def says(step: int) -> Verdict:
        share = step / STEPS
        if share not in found:
            found[share] = measure(share)
        loss = found[share]
        return "beyond" if loss is None else verdict(loss, tolerance)

    top = round(highest * STEPS)
    shown = _last(lambda step: says(step) == "within", top)
    kept = _last(lambda step: says(step) != "beyond", top)
    losses = {share: loss for share, loss in sorted(found.items()) if loss is not None}
    nearest = losses.get(min(shown + 1, top) / STEPS)
    questions = max((loss.n for loss in losses.values()), default=0)
    return Redundancy(
        shown=shown / STEPS if shown else None,
        refuted=(kept + 1) / STEPS if (kept + 1) / STEPS in losses and kept < top else None,
        losses=losses,
        tolerance=tolerance,
        questions=questions,
        needed=_needed(nearest, tolerance) if nearest is not None and kept > shown else None,
        resolved=kept == shown,
    )


def _last(holds: Callable[[int], bool], top: int) -> int:
    """Return the last of steps 1 to `top` that `holds`; 0 if none does. No step holds after one that does not."""
    below, above = 0, top + 1
    while above - below > 1:
        middle = (below + above) // 2
        if holds(middle):
            below = middle
        else:
            above = middle
    return below


def _needed(loss: Loss, tolerance: float) -> int | None:
    """Return the questions whose interval of this loss, narrowing with their square root, excludes the tolerance."""
    distance, reach = abs(tolerance - loss.loss), max(loss.high - loss.loss, loss.loss - loss.low)
    if distance == 0 or reach <= 0:
        return None
    return math.ceil(loss.n * (reach / distance) ** 2)
