"""The entries of a board: one measured recipe each, and the figures that compare them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from statistics import fmean
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from bivlm.compression.layer import LayerBits
from bivlm.errors import InputError
from bivlm.evaluation.metrics import wilson

Loss = Literal["accuracy", "kl", "relative_error"]
LOSSES: tuple[Loss, ...] = get_args(Loss)
_Positive = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_Percent = Annotated[float, Field(ge=0, le=100)]


class Accuracy(BaseModel):
    """The result of one benchmark: `n` questions, mean score and its 95 % interval (low, high) in percent."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    n: int = Field(ge=1)
    accuracy: _Percent
    ci95: tuple[_Percent, _Percent]


class FullPrecision(BaseModel):
    """The model before compression.

    Attributes:
        bits: stored bits per weight of the linears that the recipes pack: 16 for a bfloat16 model.
        model_bits: stored bits per parameter of the whole model.
        accuracy: by benchmark, in the order of the board's columns.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    bits: _Positive
    model_bits: _Positive
    accuracy: dict[str, Accuracy] = Field(min_length=1)


class _Recipe(BaseModel):
    """The facts of a recipe that are known before it is carried out.

    Attributes:
        recipe: the recipe's name, which no other entry has.
        method: see `method_label`.
        finish: whether the shards were tuned together after packing.
        needs_calibration: whether calibration samples were looked at.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    recipe: str = Field(min_length=1)
    method: str
    finish: bool = False
    needs_calibration: bool = False


class FailedEntry(_Recipe):
    """A recipe that could not be measured, and the reason."""

    failed: str = Field(min_length=1)


class Entry(_Recipe):
    """A recipe that was measured.

    Attributes:
        bits: bits per weight of the packed linears: as claimed by the method's paper (nominal), entropy, stored.
        model_bits: stored bits per parameter of the whole model.
        relative_error: see `relative_error`, measured on the stored bytes.
        kl: mean KL divergence from full precision, nats per token.
        accuracy: by benchmark.
        seconds: what the compression took.
    """

    bits: LayerBits
    model_bits: _Positive
    relative_error: _Positive
    kl: float = Field(allow_inf_nan=False)  # rounding may take a KL of zero below it
    accuracy: dict[str, Accuracy] = Field(min_length=1)
    seconds: _Positive

    @field_validator("bits")
    @classmethod
    def _finite(cls, bits: LayerBits) -> LayerBits:
        if not all(math.isfinite(value) and value >= 0 for value in vars(bits).values()):
            raise ValueError(f"bits {vars(bits)}: expected finite numbers from 0")
        return bits

    @classmethod
    def read(cls, record: Mapping[str, Any]) -> Entry:
        """Return the entry in `record`; raises `InputError` with the recipe's name and what is wrong, NaN among it."""
        try:
            return cls.model_validate(record)
        except ValidationError as error:
            wrong = [f"{'.'.join(map(str, each['loc'])) or 'entry'}: {each['msg']}" for each in error.errors()]
            raise InputError(f"recipe {record.get('recipe')!r} cannot go on the board: {'; '.join(wrong)}") from None

    @property
    def mean(self) -> dict[str, Any]:
        """`mean_accuracy` over the entry's benchmarks."""
        return mean_accuracy(self.accuracy.values())

    @property
    def times_shannon(self) -> float:
        """How many times `shannon_bound` at the stored bits the relative error is."""
        return self.relative_error / shannon_bound(self.bits.stored)

    def loss(self, loss: Loss) -> float:
        """Return the loss, 0 for none: 100 - mean accuracy in percent, KL in nats per token, or relative error."""
        return 100 - self.mean["accuracy"] if loss == "accuracy" else getattr(self, loss)


def method_label(components: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the method of a recipe's components (as in `Recipe.canonical`), "bivlm"; "awq+bivlm" if they differ."""
    return "+".join(sorted({settings["method"] for settings in components.values()}))


def relative_error(layers: Iterable[Mapping[str, Any]]) -> float:
    """Return ``sum ||W - W_rebuilt||^2 / sum ||W||^2`` over the packed linears.

    A layer is ``{"name", "error", "shape", "mean", "std"}``: its own relative squared error, and the moments of its
    weights, from which ``||W||^2 = M N (mean^2 + std^2)``; `std` divides by M N. Raises `InputError` naming a layer
    whose error is not finite, and if there is no layer or all are zero.
    """
    lost = total = 0.0
    for layer in layers:
        if not math.isfinite(layer["error"]):
            raise InputError(f"layer {layer['name']}: relative error {layer['error']}; expected a finite number")
        energy = math.prod(layer["shape"]) * (layer["mean"] ** 2 + layer["std"] ** 2)
        lost, total = lost + layer["error"] * energy, total + energy
    if total == 0:
        raise InputError("no packed linear has a weight other than zero: there is no relative error")
    return lost / total


def shannon_bound(bits: float) -> float:
    """Return ``2^(-2 R)``, the least mean squared error of a unit Gaussian source at R = `bits` bits per sample.

    Shannon, "Coding theorems for a discrete source with a fidelity criterion", 1959; Cover and Thomas, "Elements of
    information theory", theorem 10.3.2. No coding of independent Gaussian weights of one variance does better. Weights
    with heavier tails, or layers of different variances, can be coded below it: for a model it is a yardstick.
    """
    return 2.0 ** (-2 * bits)


def mean_accuracy(results: Iterable[Accuracy]) -> dict[str, Any]:
    """Return ``{"accuracy", "ci95": [low, high]}`` in percent: the mean of k benchmarks, each with the same weight.

    With p_i the accuracy of n_i questions and (l_i, u_i) its 95 % limits, the interval of the mean reaches from
    ``p - sqrt(sum (p_i - l_i)^2) / k`` to ``p + sqrt(sum (u_i - p_i)^2) / k``: variances of independent benchmarks
    recovered from their limits (Zou and Donner, Statistics in Medicine 27, 2008). For p_i far from 0 and 1 it is the
    mean -+ 1.96 standard errors of ``var = sum p_i (1 - p_i) / n_i / k^2``; unlike that it does not shrink to nothing
    at 0 or 1. The limits are Wilson's, or those of `ci95` where these are wider: Wilson's ignore that questions
    share an image, and a bootstrap of nothing but right answers has no width.

    Models on one board answer the same questions, so their differences are more certain than two intervals suggest.
    """
    results = list(results)
    mean = fmean(result.accuracy for result in results)
    below = above = 0.0
    for result in results:
        low, high = wilson(result.accuracy / 100, result.n)
        below += (result.accuracy - min(100 * low, result.ci95[0])) ** 2
        above += (max(100 * high, result.ci95[1]) - result.accuracy) ** 2
    reach_below, reach_above = math.sqrt(below) / len(results), math.sqrt(above) / len(results)
    return {"accuracy": mean, "ci95": [max(mean - reach_below, 0.0), min(mean + reach_above, 100.0)]}
