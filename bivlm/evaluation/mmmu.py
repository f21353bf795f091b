"""MMMU, validation: college questions about one image or several; ``mmmu:hub`` or a copy of it.

Yue et al., "MMMU: A Massive Multi-discipline Multimodal Understanding and Reasoning Benchmark for Expert AGI", 2024.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from typing import ClassVar

import pandas as pd

from bivlm.evaluation.answers import ASK_FOR_LETTER, ASK_FOR_WORD, LETTERS, lettered
from bivlm.evaluation.metrics import accuracy
from bivlm.evaluation.mmmu_answers import is_among, open_readings, option_letter
from bivlm.evaluation.published import PublishedSet
from bivlm.sources.parquet_rows import Layout
from bivlm.sources.rows import Row
from bivlm.sources.samples import VqaSample

DISCIPLINES: dict[str, tuple[str, ...]] = {
    "Art and Design": ("Art", "Art_Theory", "Design", "Music"),
    "Business": ("Accounting", "Economics", "Finance", "Manage", "Marketing"),
    "Science": ("Biology", "Chemistry", "Geography", "Math", "Physics"),
    "Health and Medicine": (
        "Basic_Medical_Science", "Clinical_Medicine", "Diagnostics_and_Laboratory_Medicine", "Pharmacy",
        "Public_Health",
    ),
    "Humanities and Social Science": ("History", "Literature", "Sociology", "Psychology"),
    "Tech and Engineering": (
        "Agriculture", "Architecture_and_Engineering", "Computer_Science", "Electronics", "Energy_and_Power",
        "Materials", "Mechanical_Engineering",
    ),
}  # fmt: skip
MULTIPLE_CHOICE, OPEN = "multiple-choice", "open"
_IMAGE = re.compile(r"<image (\d+)>")
_SUBJECT = re.compile(r"[^_]*_(.+?)_\d+")


@dataclass(frozen=True)
class Mmmu(PublishedSet):
    """The share of right answers, overall, by discipline and by subject.

    Images stand before the text in the order of their numbers, and the text names them: "<image 1>". A multiple
    choice in which no option is found is wrong; the published code guesses.
    """

    kind: ClassVar[str] = "mmmu"
    version: ClassVar[int] = 1
    layout: ClassVar[Layout] = Layout("lmms-lab-encoder/MMMU", None, ("validation", "val"))
    columns: ClassVar[tuple[str, ...]] = ("id", "question", "options", "answer", "question_type")
    image_columns: ClassVar[tuple[str, ...]] = tuple(f"image_{number}" for number in range(1, 8))

    max_new_tokens: int = 128

    @classmethod
    def ask(cls, row: Row) -> VqaSample:
        subject = _SUBJECT.fullmatch(row.text("id"))
        if not subject:
            row.complain("id", "an id such as validation_Accounting_1")
        kind, choices = row.text("question_type"), None
        if kind not in (MULTIPLE_CHOICE, OPEN):
            row.complain("question_type", f"{MULTIPLE_CHOICE} or {OPEN}")
        if kind == MULTIPLE_CHOICE:
            choices = _options(row)
        instruction = ASK_FOR_LETTER if choices else ASK_FOR_WORD
        question = VqaSample(
            question_id=row.text("id"),
            image_id=row.text("id"),
            image=None,
            question=f"{row.text('question')}{lettered(choices or ())}\n{instruction}",
            answers=_answers(row, choices),
            choices=choices,
            category=subject[1],
        )
        if unknown := [column for column in cls.images_of(question) if column not in cls.image_columns]:
            row.complain("question", f"images of the columns image_1 to image_7, and not {', '.join(unknown)}")
        return question

    @classmethod
    def images_of(cls, question: VqaSample) -> tuple[str, ...]:
        """Return the columns of the images that the text names, each once."""
        return tuple(sorted({f"image_{number}" for number in _IMAGE.findall(question.question)}))

    def read(self, question: VqaSample, prediction: str) -> str | None:
        """Return a letter; to an open question the answer itself, which may be right in many forms."""
        return option_letter(prediction, question.choices) if question.choices else prediction

    def score(self, sample: VqaSample, prediction: str) -> float:
        if sample.choices:
            return super().score(sample, prediction)
        return float(is_among(open_readings(prediction), sample.answers))

    def summarize(self, outcomes: pd.DataFrame) -> dict[str, float]:
        """Return accuracy by discipline and subject, and `unparsable`: multiple choices without a valid answer."""
        disciplines = {
            f"{name}/acc": accuracy(outcomes["score"][outcomes["category"].isin(subjects)])
            for name, subjects in DISCIPLINES.items()
            if outcomes["category"].isin(subjects).any()
        }
        return {**disciplines, **super().summarize(outcomes)}


def _options(row: Row) -> tuple[str, ...]:
    """Return the options, which the data set holds as the text of a list."""
    written = row.text("options")
    try:
        options = ast.literal_eval(written)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        options = None
    valid = isinstance(options, list) and 0 < len(options) <= len(LETTERS) and all(isinstance(o, str) for o in options)
    if not valid:
        row.complain("options", f"a list of 1 to {len(LETTERS)} texts, such as \"['red', 'blue']\"")
    return tuple(options)


def _answers(row: Row, choices: tuple[str, ...] | None) -> tuple[str, ...]:
    answers = row.texts("answer") if isinstance(row.values["answer"], list) else (row.text("answer"),)
    if choices and (wrong := next((each for each in answers if each not in tuple(LETTERS[: len(choices)])), None)):
        row.complain("answer", f"one of the letters {LETTERS[: len(choices)]}", wrong)
    return answers
