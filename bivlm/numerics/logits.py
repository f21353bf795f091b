"""Check that what a model computes is finite before it is used: answers, divergences, statistics, scores."""

from __future__ import annotations

import torch
from transformers import LogitsProcessor, PreTrainedModel


def not_finite(model: PreTrainedModel, found: str) -> ArithmeticError:
    """Return the error for a model that gives NaN or infinity; it names the model's folder, and `found` the place."""
    name = model.name_or_path or type(model).__name__
    return ArithmeticError(f"model {name}: gives NaN or infinity: {found}; expected finite numbers")


def unusable(logits: torch.Tensor) -> torch.Tensor:
    """Return, bool (), whether any row of logits (..., vocabulary) has no probabilities: NaN, +inf, or all -inf."""
    return ~logits.amax(-1).isfinite().all()  # NaN is larger than all numbers


class LogitsWatch(LogitsProcessor):
    """Changes nothing in the logits of `generate` and remembers, on their device, whether any were unusable."""

    def __init__(self) -> None:
        self._found: torch.Tensor | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        found = unusable(scores)
        self._found = found if self._found is None else self._found | found
        return scores

    def check(self, model: PreTrainedModel) -> None:
        """Raise ArithmeticError naming the model if any logits were unusable; waits for the device."""
        if self._found is not None and bool(self._found):
            raise not_finite(model, "logits of an answer")
