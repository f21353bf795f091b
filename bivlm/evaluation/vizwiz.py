"""VizWiz-VQA, validation: questions of blind people, answered by ten; ``vizwiz:hub`` or a copy of it.

Gurari et al., "VizWiz Grand Challenge: Answering Visual Questions from Blind People", 2018.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pandas as pd

from bivlm.evaluation.metrics import accuracy, category_accuracies
from bivlm.evaluation.published import Asked, PublishedSet
from bivlm.evaluation.vqa_accuracy import normalise, vqa_accuracy
from bivlm.sources.parquet_rows import Layout, Row
from bivlm.sources.samples import VqaSample

_ASK_FOR_A_WORD = (
    "\nWhen the provided information is insufficient, respond with 'Unanswerable'."
    "\nAnswer the question using a single word or phrase."
)
_STOP = "ASSISTANT:"  # what follows is the model talking to itself


@dataclass(frozen=True)
class VizWiz(PublishedSet):
    """The mean VQA accuracy: how far an answer agrees with the people who were asked."""

    kind: ClassVar[str] = "vizwiz"
    version: ClassVar[int] = 1
    layout: ClassVar[Layout] = Layout("lmms-lab-encoder/VizWiz-VQA", None, ("val", "validation"))
    columns: ClassVar[tuple[str, ...]] = ("question_id", "question", "answers")
    optional: ClassVar[tuple[str, ...]] = ("category",)
    max_new_tokens: ClassVar[int] = 32

    @classmethod
    def ask(cls, row: Row) -> Asked:
        return Asked(
            question_id=row.text("question_id"),
            image_id=row.text("question_id"),
            question=row.text("question", may_be_empty=True).capitalize() + _ASK_FOR_A_WORD,
            answers=row.texts("answers"),
            category=row.text("category", may_be_empty=True) if "category" in row.values else "",
        )

    def read(self, question: Asked | VqaSample, prediction: str) -> str:
        """The answer as it is compared: every text is one."""
        return normalise(prediction.split(_STOP)[0])

    def score(self, sample: Asked | VqaSample, prediction: str) -> float:
        return vqa_accuracy(prediction.split(_STOP)[0], sample.answers)

    def summarize(self, outcomes: pd.DataFrame) -> dict[str, float]:
        return category_accuracies(outcomes)

    def chance(self) -> float:
        """What "unanswerable" to every question scores."""
        return accuracy([self.score(each, "unanswerable") for each in self.asked])
