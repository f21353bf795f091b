"""Two models, or one model twice, asked the same questions: how much is lost, and how sure that is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import pandas as pd

from bivlm.errors import InputError
from bivlm.evaluation.metrics import CONFIDENCE, bootstrap_interval


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
    """Compare outcomes (`bivlm.evaluation.COLUMNS`) question by question.

    The interval is the wider, on each side, of two. Bonett and Price's adjusted Wald interval for paired proportions
    (British Journal of Mathematical and Statistical Psychology 65, 2012) knows that no change among n questions does
    not mean that there is none among all; the bootstrap over images knows that questions about one image stand and fall
    together. Scores between 0 and 1 count in part. Raises `InputError` unless both have the same questions.
    """
    if list(before["question_id"]) != list(after["question_id"]):
        raise InputError("paired comparison: expected the same questions in the same order in both evaluations")
    lost = before["score"].to_numpy(np.float64) - after["score"].to_numpy(np.float64)
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


def mcnemar(worse: int, better: int) -> float:
    """Two-sided exact p-value of `worse` and `better` discordant pairs (McNemar, Psychometrika 12, 1947)."""
    changed, fewer = worse + better, min(worse, better)
    tail = sum(math.comb(changed, k) for k in range(fewer + 1))
    return min(1.0, 2 * tail / 2**changed)
