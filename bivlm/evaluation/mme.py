"""MME: two questions per image, to be answered yes and no; ``mme:hub`` or a copy of it.

Fu et al., "MME: A Comprehensive Evaluation Benchmark for Multimodal Large Language Models", 2023.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import ClassVar

import pandas as pd

from bivlm.errors import InputError
from bivlm.evaluation.answers import ASK_FOR_WORD, yes_or_no
from bivlm.evaluation.metrics import mme_interval, mme_metrics, mme_score
from bivlm.evaluation.published import PublishedSet
from bivlm.sources.parquet_rows import Layout, Rows
from bivlm.sources.rows import Row
from bivlm.sources.samples import VqaSample

PARTS: dict[str, tuple[str, ...]] = {
    "perception": (
        "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
    ),
    "cognition": ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning"),
}  # fmt: skip
_CATEGORIES = tuple(category for categories in PARTS.values() for category in categories)
_REPLACED = " Please answer yes or no."


@dataclass(frozen=True)
class Mme(PublishedSet):
    """The sums over categories of acc and acc+: perception up to 2000, cognition up to 800."""

    kind: ClassVar[str] = "mme"
    version: ClassVar[int] = 1
    layout: ClassVar[Layout] = Layout("lmms-lab-encoder/MME", None, ("test",))
    columns: ClassVar[tuple[str, ...]] = ("question_id", "question", "answer", "category")

    max_new_tokens: int = 16

    @classmethod
    def ask(cls, row: Row) -> VqaSample:
        category = row.text("category")
        if category not in _CATEGORIES:
            row.complain("category", f"one of {', '.join(_CATEGORIES)}")
        answer = row.text("answer").lower().strip().replace(".", "")
        if answer not in ("yes", "no"):
            row.complain("answer", "Yes or No")
        return VqaSample(
            question_id=row.text("question_id"),
            image_id=row.text("question_id"),
            image=None,
            question=row.text("question").strip().replace(_REPLACED, "") + ASK_FOR_WORD,
            answers=(answer,),
            category=category,
        )

    @classmethod
    def arrange(cls, rows: Rows, asked: tuple[VqaSample, ...], limit: int | None) -> tuple[VqaSample, ...]:
        """Return the questions with the id of their image and a number; a limit may cut the last pair apart."""
        seen: Counter[tuple[str, str]] = Counter()
        numbered = []
        for each in asked:
            place = (each.category, each.image_id)
            seen[place] += 1
            numbered.append(replace(each, question_id=f"{each.question_id} {seen[place]}"))
        for (category, image), count in seen.items():
            if count > 2 or (count < 2 and limit is None):
                raise InputError(
                    f"{rows.place}: found {count} rows with the question_id {image!r} in the category {category}, "
                    "expected two, one to be answered yes and one no"
                )
        return super().arrange(rows, tuple(numbered), limit)

    def read(self, question: VqaSample, prediction: str) -> str | None:
        return yes_or_no(prediction)

    def summarize(self, outcomes: pd.DataFrame) -> dict[str, float]:
        """Return `perception` and `cognition` (as far as they were asked about), and `mme_metrics`."""
        parts = {part: mme_score(mme_metrics(outcomes), categories) for part, categories in _asked_parts(outcomes)}
        return {**parts, **mme_metrics(outcomes), "unparsable": self.unparsable(outcomes)}

    def intervals(self, outcomes: pd.DataFrame) -> dict[str, list[float]]:
        return {part: list(mme_interval(outcomes, categories)) for part, categories in _asked_parts(outcomes)}

    def chance(self) -> float:
        """Return what the better constant answer scores."""
        counts = Counter(each.answers[0] for each in self.asked)
        return 100.0 * max(counts.values()) / len(self.asked)


def _asked_parts(outcomes: pd.DataFrame) -> list[tuple[str, list[str]]]:
    asked = set(outcomes["category"])
    parts = ((part, [category for category in categories if category in asked]) for part, categories in PARTS.items())
    return [(part, categories) for part, categories in parts if categories]
