"""Compare two evaluations of the same questions: how much is lost, and how sure that is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import pandas as pd
from scipy.special import betaincinv

from bivlm.errors import InputError
from bivlm.evaluation.metrics import CONFIDENCE, bootstrap_interval, bootstrap_means

MOST_QUESTIONS = 10**8  # the largest answer of `questions_needed`


@dataclass(frozen=True)
class Loss:
    """What the second of two evaluations lost against the first.

    Attributes:
        n: questions.
        loss: mean score of the first less that of the second, in percentage points.
        low, high: the 95 % interval of the loss.
        worse, better: questions whose score fell, and rose.
        p_value: of McNemar's exact test that scores fall as often as they rise (1 if none changed).
    """

    n: int
    loss: float
    low: float
    high: float
    worse: int
    better: int
    p_value: float


def loss_between(before: pd.DataFrame, after: pd.DataFrame) -> Loss:
    """Compare outcomes (`bivlm.evaluation.outcomes.COLUMNS`) question by question.

    The interval is the wider, on each side, of two. Bonett and Price's adjusted Wald interval for paired proportions
    (British Journal of Mathematical and Statistical Psychology 65, 2012) knows that no change among n questions does
    not mean that there is none among all; the bootstrap over images knows that questions about one image stand and fall
    together. Scores between 0 and 1 count in part. Raises `InputError` unless both have the same questions.
    """
    lost = _lost(before, after)
    n = len(lost)
    falls, rises = float(lost[lost > 0].sum()), float(-lost[lost < 0].sum())
    down, up = (falls + 1) / (n + 2), (rises + 1) / (n + 2)
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    reach = z * math.sqrt((down + up - (down - up) ** 2) / (n + 2))
    low, high = bootstrap_interval(lost, before["image_id"])
    worse, better = int((lost > 0).sum()), int((lost < 0).sum())
    return Loss(
        n=n,
        loss=100 * float(lost.mean()),
        low=min(low, 100 * (down - up - reach)),
        high=max(high, 100 * (down - up + reach)),
        worse=worse,
        better=better,
        p_value=mcnemar(worse, better),
    )


@dataclass(frozen=True)
class LargestLoss:
    """What the second of two evaluations may have lost against the first, at most.

    Attributes:
        n: questions.
        loss: mean score of the first less that of the second, in percentage points.
        largest: the upper end of the one-sided interval of the loss, in percentage points.
        confidence: of that end.
        fell, rose: sum of all that scores fell, and rose, in questions.
    """

    n: int
    loss: float
    largest: float
    confidence: float
    fell: float
    rose: float


def largest_loss(before: pd.DataFrame, after: pd.DataFrame, confidence: float) -> LargestLoss:
    """Compare outcomes (`bivlm.evaluation.outcomes.COLUMNS`) question by question, for a decision.

    The end is the larger of two: that of `largest_difference`, and that of the bootstrap over images, because questions
    about one image stand and fall together. Raises `InputError` unless both have the same questions.
    """
    lost = _lost(before, after)
    fell, rose, n = float(lost[lost > 0].sum()), float(-lost[lost < 0].sum()), len(lost)
    of_images = float(np.percentile(bootstrap_means(lost, before["image_id"]), 100 * confidence))
    return LargestLoss(
        n=n,
        loss=100 * float(lost.mean()),
        largest=max(of_images, 100 * largest_difference(fell, rose, n, confidence)),
        confidence=confidence,
        fell=fell,
        rose=rose,
    )


def largest_difference(fell: float, rose: float, n: int, confidence: float) -> float:
    """Return the upper end of the one-sided interval of the difference of two paired proportions, as a share.

    The limits of Clopper and Pearson (Biometrika 26, 1934) of the share that fell and of that which rose, joined by
    their variances (Donner and Zou, Statistical Methods in Medical Research 21, 2012): where none rose it is Clopper
    and Pearson's exact limit, so that no change among n questions still leaves about 3 / n of loss.
    """
    down, up = fell / n, rose / n
    highest_down = float(betaincinv(fell + 1, n - fell, confidence)) if fell < n else 1.0
    lowest_up = float(betaincinv(rose, n - rose + 1, 1 - confidence)) if rose > 0 else 0.0
    above, below = highest_down - down, up - lowest_up
    # Of one question's shares, those that fell and that rose exclude each other: a negative correlation.
    correlation = -math.sqrt(down * up / ((1 - down) * (1 - up))) if max(down, up) < 1 else 0.0
    return down - up + math.sqrt(above**2 + below**2 - 2 * correlation * above * below)


def questions_needed(found: LargestLoss, bound: float) -> int | None:
    """Return about how many questions bring the end down to `bound` points, if the same shares of them fall and rise.

    It is rounded up to two digits; None if no number of questions up to `MOST_QUESTIONS` is enough.
    """

    def end(n: int) -> float:
        falls, rises = found.fell * n / found.n, found.rose * n / found.n
        return found.loss + wider * (100 * largest_difference(falls, rises, n, found.confidence) - found.loss)

    # How much wider the images make the interval than that many questions alone would.
    alone = 100 * largest_difference(found.fell, found.rose, found.n, found.confidence)
    wider = (found.largest - found.loss) / (alone - found.loss)
    if found.loss >= bound or end(MOST_QUESTIONS) > bound:
        return None
    low, high = 1, MOST_QUESTIONS
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if end(middle) <= bound else (middle + 1, high)
    step = 10 ** max(0, len(str(low)) - 2)
    return -(-low // step) * step


def _lost(before: pd.DataFrame, after: pd.DataFrame) -> np.ndarray:
    """Return what every question lost, from -1 to 1."""
    if list(before["question_id"]) != list(after["question_id"]):
        raise InputError("paired comparison: expected the same questions in the same order in both evaluations")
    return before["score"].to_numpy(np.float64) - after["score"].to_numpy(np.float64)


def mcnemar(worse: int, better: int) -> float:
    """Return the two-sided exact p-value of `worse` and `better` discordant pairs (McNemar, Psychometrika 12, 1947)."""
    changed, fewer = worse + better, min(worse, better)
    tail = sum(math.comb(changed, k) for k in range(fewer + 1))
    return min(1.0, 2 * tail / 2**changed)
