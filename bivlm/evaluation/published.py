"""What published benchmarks share: rows of a data set become questions, pictures are decoded as they are needed.

The prompts, the reading of answers and the metrics of the sets are those of lmms-eval 0.7.3 in its default setting;
``docs/benchmarks.md`` says where one departs from it.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Self

import pandas as pd

from bivlm.errors import InputError
from bivlm.evaluation.benchmark import Benchmark
from bivlm.evaluation.metrics import category_accuracies
from bivlm.sources.parquet_rows import ARGUMENT, Layout, Row, Rows, open_rows
from bivlm.sources.samples import VqaSample
from bivlm.workspace.hashing import digest

# Of gigabytes of pictures, and a sweep opens its benchmarks once a cell: hashed once a process, while files stay.
_DIGESTS: dict[tuple[Any, ...], str] = {}


@dataclass(frozen=True)
class Asked:
    """A question without its pictures; the fields are those of `VqaSample`, `pictures` the columns that hold them."""

    question_id: str
    image_id: str
    question: str
    answers: tuple[str, ...]
    choices: tuple[str, ...] | None = None
    category: str = ""
    pictures: tuple[str, ...] = ("image",)


@dataclass(frozen=True)
class PublishedSet(Benchmark):
    """A split of a data set. A subclass says where it lies, what a row asks and how an answer is scored."""

    argument: ClassVar[str] = ARGUMENT
    layout: ClassVar[Layout]
    columns: ClassVar[tuple[str, ...]]  # all but the pictures
    optional: ClassVar[tuple[str, ...]] = ()  # read where they are there
    picture_columns: ClassVar[tuple[str, ...]] = ("image",)

    given: str  # after the colon
    rows: Rows
    asked: tuple[Asked, ...]

    @classmethod
    def load(cls, argument: str, limit: int | None) -> Self:
        """Reads and checks everything but the pictures of the first `limit` rows.

        Raises `InputError` naming row and column, and ConnectionError when the hub cannot be reached.
        """
        rows = open_rows(cls.kind, argument, cls.layout, limit)
        rows.check_columns((*cls.columns, *cls.picture_columns))
        optional = [column for column in cls.optional if column in rows.columns]
        asked = tuple(cls.ask(row) for row in rows.read([*cls.columns, *optional], limit))
        if not asked:
            raise InputError(f"{rows.place}: found no rows, expected one a question")
        return cls(argument, rows, cls.arrange(rows, asked, limit))

    @classmethod
    @abstractmethod
    def ask(cls, row: Row) -> Asked:
        """The question of a row of `columns`; raises `InputError`."""

    @classmethod
    def arrange(cls, rows: Rows, asked: tuple[Asked, ...], limit: int | None) -> tuple[Asked, ...]:
        """The questions with ids of their own, and what can only be checked of all of them; raises `InputError`."""
        for question_id, count in Counter(each.question_id for each in asked).items():
            if count > 1:
                raise InputError(f"{rows.place}: found {count} rows with the id {question_id!r}, expected one")
        return asked

    @abstractmethod
    def read(self, question: Asked | VqaSample, prediction: str) -> str | None:
        """What an answer is read as; None where nothing valid was found."""

    @property
    def name(self) -> str:
        return self.kind

    @property
    def task(self) -> str:
        return f"{self.kind}:{self.given}"

    def source(self) -> dict[str, str | None]:
        """`data_set`, `revision` (a commit of the hub, or None for a folder), `subset` and `split`."""
        return dict(self.rows.source)

    def __len__(self) -> int:
        return len(self.asked)

    def __iter__(self) -> Iterator[VqaSample]:
        for asked, row in zip(self.asked, self.rows.read(self.picture_columns, len(self)), strict=True):
            first, *others = [row.picture(column) for column in asked.pictures] or [None]
            yield VqaSample(
                question_id=asked.question_id,
                image_id=asked.image_id,
                image=first,
                question=asked.question,
                answers=asked.answers,
                choices=asked.choices,
                category=asked.category,
                further_images=tuple(others),
            )

    def summarize(self, outcomes: pd.DataFrame) -> dict[str, float]:
        """Accuracy by category, and `unparsable`: the number of answers in which nothing valid was found."""
        return {**category_accuracies(outcomes), "unparsable": self.unparsable(outcomes)}

    def unparsable(self, outcomes: pd.DataFrame) -> float:
        """The number of answers that `read` finds nothing in."""
        questions = {each.question_id: each for each in self.asked}
        said = zip(outcomes["question_id"], outcomes["prediction"], strict=True)
        return float(sum(self.read(questions[question_id], text) is None for question_id, text in said))

    @cached_property
    def digest(self) -> str:
        """As `Benchmark.digest`, over the stored bytes of the pictures: the same for every copy of the set."""
        key = (type(self).kind, self.version, len(self), self.rows.stamp())
        if key not in _DIGESTS:
            rows = self.rows.read(self.picture_columns, len(self))
            asked = [
                [
                    {name: value for name, value in vars(each).items() if name != "pictures"},
                    [hashlib.sha256(row.picture_bytes(column)).hexdigest() for column in each.pictures],
                ]
                for each, row in zip(self.asked, rows, strict=True)
            ]
            _DIGESTS[key] = digest([self.kind, self.version, self.max_new_tokens, asked])
        return _DIGESTS[key]


def random_letter(asked: Sequence[Asked]) -> float:
    """Percent that a random letter scores; open questions count as lost."""
    return 100.0 * sum(1 / len(each.choices) for each in asked if each.choices) / len(asked)
