"""Figures of a set from the scores of its questions: accuracy, its confidence interval, the MME score."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import NormalDist

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

RESAMPLES = 2000
CONFIDENCE = 0.95
_CHUNK = 1 << 20  # drawn image counts held at once


def accuracy(scores: Sequence[float]) -> float:
    """Return the mean score in percent; scores are in [0, 1]."""
    return 100.0 * float(np.mean(scores))


def category_accuracies(outcomes: pd.DataFrame) -> dict[str, float]:
    """Return `{category}/acc` in percent for every named category, in alphabetical order."""
    named = outcomes[outcomes["category"] != ""]
    return {f"{category}/acc": accuracy(group["score"]) for category, group in named.groupby("category")}


def mme_metrics(outcomes: pd.DataFrame) -> dict[str, float]:
    """Return the score of MME (Fu et al., 2023): over the categories, the sum of acc and acc+, each 0 to 100.

    `{category}/acc` is the percentage of questions answered right, `{category}/acc_plus` of images whose two questions
    are both right; `mme_score` is their sum and `mme_max` 200 per category. A limit can cut a set within an image: one
    that was asked about once does not count for acc_plus, unless its category has no other.
    """
    metrics: dict[str, float] = {}
    categories = outcomes.groupby("category")
    for category, group in categories:
        images = group.groupby("image_id")["score"].agg(["min", "size"])
        pairs = images[images["size"] > 1] if (images["size"] > 1).any() else images
        metrics[f"{category}/acc"] = accuracy(group["score"])
        metrics[f"{category}/acc_plus"] = accuracy(pairs["min"] == 1.0)
    return {"mme_score": sum(metrics.values()), "mme_max": 200.0 * categories.ngroups, **metrics}


def mme_score(metrics: Mapping[str, float], categories: Iterable[str]) -> float:
    """Return the sum of acc and acc+ over some categories of `mme_metrics`."""
    return sum(metrics[f"{category}/{figure}"] for category in categories for figure in ("acc", "acc_plus"))


def mme_interval(
    outcomes: pd.DataFrame, categories: Iterable[str], *, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """Return the 95 % percentile interval of `mme_score`: in each category as many images are drawn as it has.

    Images that were asked about once count as in `mme_metrics`, for acc alone, unless their category has no other.
    """
    random = np.random.default_rng(seed)
    total = np.zeros(resamples)
    for category in categories:
        scores = outcomes[outcomes["category"] == category].groupby("image_id")["score"]
        images = scores.agg(["sum", "size", "min"])
        paired = images["size"].to_numpy() > 1
        paired = paired if paired.any() else np.ones_like(paired)
        right, asked = images["sum"].to_numpy(np.float64), images["size"].to_numpy(np.float64)
        both = (images["min"].to_numpy() == 1.0) & paired
        drawn = random.integers(len(images), size=(resamples, len(images)))
        pairs = np.maximum(paired[drawn].sum(1), 1)  # a draw may hold no pair, where a limit left single questions
        total += 100.0 * (right[drawn].sum(1) / asked[drawn].sum(1) + both[drawn].sum(1) / pairs)
    return _middle(total)


def bootstrap_interval(
    scores: ArrayLike, images: Sequence[str], *, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """Return the 95 % percentile interval of the mean score, in percent; see `bootstrap_means`."""
    return _middle(bootstrap_means(scores, images, resamples=resamples, seed=seed))


def bootstrap_means(
    scores: ArrayLike, images: Sequence[str], *, resamples: int = RESAMPLES, seed: int = 0
) -> np.ndarray:
    """Return the mean scores in percent of `resamples` draws, in no order.

    Questions about one image stand and fall together, so whole images are drawn with replacement (the cluster
    bootstrap: Davison and Hinkley, 1997, section 3.8), and the mean is over the questions that they bring.
    """
    _, image_of = np.unique(np.asarray(images, dtype=str), return_inverse=True)
    total = np.bincount(image_of, weights=np.asarray(scores, dtype=np.float64))
    asked = np.bincount(image_of)
    random = np.random.default_rng(seed)
    means: list[np.ndarray] = []
    step = max(1, _CHUNK // len(total))
    for start in range(0, resamples, step):
        shape = (min(step, resamples - start), len(total))
        drawn = random.integers(len(total), size=shape)
        means.append(total[drawn].sum(1) / asked[drawn].sum(1))
    return 100 * np.concatenate(means)


def wilson(share: float, n: int) -> tuple[float, float]:
    """Return Wilson's 95 % score interval of a share of n (J. of the American Statistical Association 22, 1927)."""
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return middle - half, middle + half


def _middle(figures: np.ndarray) -> tuple[float, float]:
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(figures, [tail, 100 - tail])
    return float(low), float(high)
