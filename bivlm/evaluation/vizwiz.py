"""VizWiz-VQA, validation: questions of blind people, answered by ten; ``vizwiz:hub`` or a copy of it.

Gurari et al., "VizWiz Grand Challenge: Answering Visual Questions from Blind People", 2018.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pandas as pd

from bivlm.evaluation.answers import ASK_FOR_WORD
from bivlm.evaluation.metrics import accuracy, category_accuracies
from bivlm.evaluation.published import PublishedSet
from bivlm.evaluation.vqa_accuracy import normalise, vqa_accuracy
from bivlm.sources.parquet_rows import Layout
from bivlm.sources.rows import Row
from bivlm.sources.samples import VqaSample

_OR_UNANSWERABLE = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."
_STOP = "ASSISTANT:"  # what follows is the model talking to itself


@dataclass(frozen=True)
class VizWiz(PublishedSet):
    """The mean VQA accuracy: how far an answer agrees with the people who were asked."""

    kind: ClassVar[str] = "vizwiz"
    version: ClassVar[int] = 1
    layout: ClassVar[Layout] = Layout("lmms-lab-encoder/VizWiz-VQA", None, ("val", "validation"))
    columns: ClassVar[tuple[str, ...]] = ("question_id", "question", "answers")
    optional: ClassVar[tuple[str, ...]] = ("category",)

    max_new_tokens: int = 32

    @classmethod
    def ask(cls, row: Row) -> VqaSample:
        return VqaSample(
            question_id=row.text("question_id"),
            image_id=row.text("question_id"),
            image=None,
            question=row.text("question", may_be_empty=True).capitalize() + _OR_UNANSWERABLE + ASK_FOR_WORD,
            answers=row.texts("answers", may_be_empty=True),
            category=row.text("category", may_be_empty=True),
        )

    def read(self, question: VqaSample, prediction: str) -> str:
        """Return the answer as it is compared: every text is one."""
        return normalise(prediction.split(_STOP)[0])

    def score(self, sample: VqaSample, prediction: str) -> float:
        return vqa_accuracy(prediction.split(_STOP)[0], sample.answers)

    def summarize(self, outcomes: pd.DataFrame) -> dict[str, float]:
        return category_accuracies(outcomes)

    def chance(self) -> float:
        """Return what "unanswerable" to every question scores."""
        return accuracy([self.score(each, "unanswerable") for each in self.asked])
