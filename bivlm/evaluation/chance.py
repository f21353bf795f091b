"""Find question sets on which a model is not above chance, where no figure says what compression does to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from bivlm.evaluation.metrics import wilson

_FULL_PRECISION = "full precision"
_WAY_OUT = "name its own benchmark in `evaluation`, e.g. vqa:FOLDER"
_WAY_OUT_OF_A_FOLDER = "check their answers and the chat template, or ask others"  # which is the user's own already


class AtChance(BaseModel):
    """A question set whose accuracy is not above chance; as text the sentence that says so.

    Attributes:
        task: the set.
        n: questions.
        accuracy: percent.
        chance: percent that an answer without looking scores, see `Benchmark.chance`; None where it is unknown.
        model: whose accuracy it is.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    task: str
    n: int = Field(ge=1)
    accuracy: float = Field(ge=0, le=100)
    chance: float | None = Field(ge=0, le=100)
    model: str = _FULL_PRECISION

    def __str__(self) -> str:
        way_out = _WAY_OUT_OF_A_FOLDER if self.task.startswith("vqa:") else _WAY_OUT
        level = "chance is unknown" if self.chance is None else f"chance is {self.chance:.1f} %"
        said = f"{self.task}: {self.model} scores {self.accuracy:.1f} %, {level}"
        if self.accuracy > (self.chance or 0.0):
            asked = "1 question" if self.n == 1 else f"{self.n:,} questions"
            return f"{said}: {asked} cannot tell them apart; ask more of them, or {way_out}"
        return f"{said}: these questions do not measure this model; {way_out}"


def at_chance(
    evaluations: Mapping[str, Mapping[str, Any]], levels: Mapping[str, float | None], model: str = _FULL_PRECISION
) -> list[AtChance]:
    """Return the sets on which `model` is not above chance, in the order of `evaluations`.

    `evaluations` has by task ``{"n", "metrics": {"accuracy"}, "ci95": [low, high]}`` and `levels` the chance, all in
    percent; where chance is unknown it counts as 0. Accuracy is above chance if the lower end of its 95 % interval is:
    of Wilson's, or of `ci95` where that is lower. A bootstrap of nothing but right answers has no width, and Wilson's
    interval does not know that questions about one image stand and fall together.
    """
    found = []
    for task, each in evaluations.items():
        n, accuracy, chance = each["n"], each["metrics"]["accuracy"], levels.get(task)
        low = min(100 * wilson(accuracy / 100, n)[0], each["ci95"][0])
        if low <= (chance or 0.0):
            found.append(AtChance(task=task, n=n, accuracy=accuracy, chance=chance, model=model))
    return found


def set_of(warning: str) -> str | None:
    """Return the set that a warning is about if it is what `AtChance` says of full precision, else None."""
    task, scores, _ = warning.partition(f": {_FULL_PRECISION} scores ")
    return task if scores and warning.endswith((_WAY_OUT, _WAY_OUT_OF_A_FOLDER)) else None
