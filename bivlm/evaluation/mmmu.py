"""MMMU, validation: college questions about one picture or several; ``mmmu:hub`` or a copy of it.

Yue et al., "MMMU: A Massive Multi-discipline Multimodal Understanding and Reasoning Benchmark for Expert AGI", 2024.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from typing import ClassVar

import pandas as pd

from bivlm.evaluation.answers import LETTERS
from bivlm.evaluation.metrics import accuracy
from bivlm.evaluation.mmmu_answers import is_among, open_readings, option_letter
from bivlm.evaluation.published import Asked, PublishedSet, random_letter
from bivlm.sources.parquet_rows import Layout, Row
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
_ASK_FOR_LETTER = "Answer with the option's letter from the given choices directly."
_ASK_FOR_A_WORD = "Answer the question using a single word or phrase."
_PICTURE = re.compile(r"<image (\d+)>")
_SUBJECT = re.compile(r"[^_]*_(.+?)_\d+")


@dataclass(frozen=True)
class Mmmu(PublishedSet):
    """The share of right answers, overall, by discipline and by subject.

    Pictures stand before the text in the order of their numbers, and the text names them: "<image 1>". A multiple
    choice in which no option is found is wrong; the published code guesses.
    """

    kind: ClassVar[str] = "mmmu"
    version: ClassVar[int] = 1
    layout: ClassVar[Layout] = Layout("lmms-lab-encoder/MMMU", None, ("validation", "val"))
    columns: ClassVar[tuple[str, ...]] = ("id", "question", "options", "answer", "question_type")
    picture_columns: ClassVar[tuple[str, ...]] = tuple(f"image_{number}" for number in range(1, 8))
    max_new_tokens: ClassVar[int] = 128

    @classmethod
    def ask(cls, row: Row) -> Asked:
        subject = _SUBJECT.fullmatch(row.text("id"))
        if not subject:
            row.complain("id", row.values["id"], "an id such as validation_Accounting_1")
        kind, choices, question = row.text("question_type"), None, row.text("question")
        if kind not in (MULTIPLE_CHOICE, OPEN):
            row.complain("question_type", kind, f"{MULTIPLE_CHOICE} or {OPEN}")
        if kind == MULTIPLE_CHOICE:
            choices = _options(row)
            question += "\n" + "\n".join(f"{name}. {text}" for name, text in zip(LETTERS, choices, strict=False))
        return Asked(
            question_id=row.text("id"),
            image_id=row.text("id"),
            question=f"{question}\n\n{_ASK_FOR_LETTER if choices else _ASK_FOR_A_WORD}",
            answers=_answers(row, choices),
            choices=choices,
            category=subject[1],
            pictures=_pictures(row, question),
        )

    def read(self, question: Asked | VqaSample, prediction: str) -> str | None:
        """A letter; to an open question the answer itself, which may be right in many forms."""
        return option_letter(prediction, question.choices) if question.choices else prediction

    def score(self, sample: Asked | VqaSample, prediction: str) -> float:
        if sample.choices:
            return float(self.read(sample, prediction) in sample.answers)
        return float(is_among(open_readings(prediction), sample.answers))

    def summarize(self, outcomes: pd.DataFrame) -> dict[str, float]:
        """Accuracy by discipline and by subject, and `unparsable`: multiple choices in which no option was found."""
        disciplines = {
            f"{name}/acc": accuracy(outcomes["score"][outcomes["category"].isin(subjects)])
            for name, subjects in DISCIPLINES.items()
            if outcomes["category"].isin(subjects).any()
        }
        return {**disciplines, **super().summarize(outcomes)}

    def chance(self) -> float:
        """What a random letter scores; open questions count as lost."""
        return random_letter(self.asked)


def _options(row: Row) -> tuple[str, ...]:
    """The options, which the data set holds as the text of a list."""
    written = row.text("options")
    try:
        options = ast.literal_eval(written)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        options = None
    valid = isinstance(options, list) and 0 < len(options) <= len(LETTERS) and all(isinstance(o, str) for o in options)
    if not valid:
        row.complain("options", written, f"a list of 1 to {len(LETTERS)} texts, such as \"['red', 'blue']\"")
    return tuple(options)


def _answers(row: Row, choices: tuple[str, ...] | None) -> tuple[str, ...]:
    answers = row.texts("answer") if isinstance(row.values["answer"], list) else (row.text("answer"),)
    if choices and (wrong := next((each for each in answers if each not in tuple(LETTERS[: len(choices)])), None)):
        row.complain("answer", wrong, f"one of the letters {LETTERS[: len(choices)]}")
    return answers


def _pictures(row: Row, text: str) -> tuple[str, ...]:
    """The columns of the pictures that the text names, each once."""
    columns = sorted({f"image_{number}" for number in _PICTURE.findall(text)})
    if unknown := [column for column in columns if column not in Mmmu.picture_columns]:
        row.complain("question", text, f"pictures of the columns image_1 to image_7, and not {', '.join(unknown)}")
    return tuple(columns)
