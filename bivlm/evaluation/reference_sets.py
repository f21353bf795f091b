"""The four question sets of the reference model: ``reference:perception``, ``cognition``, ``choice``, ``open``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import pandas as pd

from bivlm.errors import InputError
from bivlm.evaluation.answers import letter, yes_or_no
from bivlm.evaluation.benchmark import Benchmark
from bivlm.evaluation.metrics import accuracy, category_accuracies, mme_metrics
from bivlm.evaluation.vqa_accuracy import vqa_accuracy
from bivlm.reference.question_sets import QUESTION_SETS, TEST_QUESTIONS, Question, questions, questions_alone
from bivlm.sources.samples import VqaSample

Reading = Callable[[str], str | None]

OPTIONS = 4
# How an answer is read. An answer that cannot be read is wrong.
READINGS: dict[str, Reading] = {
    "perception": yes_or_no,
    "cognition": yes_or_no,
    "choice": lambda text: letter(text, OPTIONS),
}


@dataclass(frozen=True)
class ReferenceSet(Benchmark):
    """One of the sets, scored as the benchmark that it is shaped like: MME (twice), ScienceQA, VizWiz."""

    kind: ClassVar[str] = "reference"
    argument: ClassVar[str] = "|".join(QUESTION_SETS)
    version: ClassVar[int] = 1

    question_set: str
    count: int
    max_new_tokens: int = 8  # answers are a token or two; a damaged model must not babble for long

    @classmethod
    def load(cls, argument: str, limit: int | None) -> ReferenceSet:
        if argument not in QUESTION_SETS:
            raise InputError(f"reference set {argument!r} is not known; valid: {', '.join(QUESTION_SETS)}")
        return _once(argument, TEST_QUESTIONS if limit is None else min(limit, TEST_QUESTIONS))

    @property
    def name(self) -> str:
        return self.question_set

    @property
    def task(self) -> str:
        return f"{self.kind}:{self.name}"

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[VqaSample]:
        return questions(self.name, limit=self.count)

    def score(self, sample: VqaSample | Question, prediction: str) -> float:
        if self.name not in READINGS:
            return vqa_accuracy(prediction, sample.answers)
        return float(READINGS[self.name](prediction) == sample.answers[0])

    def summarize(self, outcomes: pd.DataFrame) -> dict[str, float]:
        """Return MME figures for perception and cognition, accuracy per category for the others.

        `unreadable` is the percentage of answers in which no yes, no or letter was found.
        """
        if self.name not in READINGS:
            return category_accuracies(outcomes)
        unreadable = accuracy([READINGS[self.name](text) is None for text in outcomes["prediction"]])
        figures = category_accuracies(outcomes) if self.name == "choice" else mme_metrics(outcomes)
        return {**figures, "unreadable": unreadable}

    def chance(self) -> float:
        return chance(self.name)


@cache
def _once(name: str, count: int) -> ReferenceSet:
    """Return one object per set, so that its images are drawn once for the digest of all models."""
    return ReferenceSet(name, count)


@cache
def chance(name: str) -> float:
    """Return the percent that the best constant answer scores on all test questions; for choice, a random letter."""
    if name == "choice":
        return 100 / OPTIONS
    asked, scored = questions_alone(name), ReferenceSet(name, TEST_QUESTIONS)
    return max(
        accuracy([scored.score(question, constant) for question in asked])
        for constant in {question.target for question in asked}
    )
