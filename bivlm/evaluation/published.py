"""What published benchmarks share: rows of a data set become questions, images are decoded as they are needed.

The prompts, the reading of answers and the metrics of the sets are those of lmms-eval 0.7.3 in its default setting;
``docs/benchmarks.md`` says where one departs from it.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, Self

import pandas as pd

from bivlm.errors import InputError
from bivlm.evaluation.benchmark import Benchmark
from bivlm.evaluation.metrics import category_accuracies
from bivlm.sources.images import clipped_rgb, decode_image
from bivlm.sources.parquet_rows import ARGUMENT, Layout, Rows, open_rows
from bivlm.sources.rows import Row
from bivlm.sources.samples import VqaSample
from bivlm.workspace.hashing import digest

# Of gigabytes of images, and a sweep opens its benchmarks once per cell: hashed once per process, while files stay.
_DIGESTS: dict[tuple[Any, ...], str] = {}


@dataclass(frozen=True)
class PublishedSet(Benchmark):
    """A split of a data set. A subclass says where it lies, what a row asks and how an answer is read."""

    argument: ClassVar[str] = ARGUMENT
    layout: ClassVar[Layout]
    columns: ClassVar[tuple[str, ...]]  # all but the images
    optional: ClassVar[tuple[str, ...]] = ()  # read where they are there
    image_columns: ClassVar[tuple[str, ...]] = ("image",)

    given: str  # after the colon
    rows: Rows
    asked: tuple[VqaSample, ...]  # without their images

    @classmethod
    def load(cls, argument: str, limit: int | None) -> Self:
        """Read and check everything but the images of the first `limit` rows.

        Raises `InputError` naming row and column, and ConnectionError when the hub cannot be reached.
        """
        rows = open_rows(cls.kind, argument, cls.layout, limit)
        rows.check_columns((*cls.columns, *cls.image_columns))
        optional = [column for column in cls.optional if column in rows.columns]
        asked = tuple(cls.ask(row) for row in rows.read([*cls.columns, *optional], limit))
        if not asked:
            raise InputError(f"{rows.place}: found no rows, expected one a question")
        return cls(argument, rows, cls.arrange(rows, asked, limit))

    @classmethod
    @abstractmethod
    def ask(cls, row: Row) -> VqaSample:
        """Return the question of a row of `columns`, without its images; raises `InputError`."""

    @classmethod
    def arrange(cls, rows: Rows, asked: tuple[VqaSample, ...], limit: int | None) -> tuple[VqaSample, ...]:
        """Return the questions with distinct ids, checked for what only all of them show; raises `InputError`."""
        for question_id, count in Counter(each.question_id for each in asked).items():
            if count > 1:
                raise InputError(f"{rows.place}: found {count} rows with the id {question_id!r}, expected one")
        return asked

    @classmethod
    def images_of(cls, question: VqaSample) -> tuple[str, ...]:
        """Return the columns that hold the images of a question, in their order."""
        return cls.image_columns

    @abstractmethod
    def read(self, question: VqaSample, prediction: str) -> str | None:
        """Return what an answer is read as; None where nothing valid was found."""

    def score(self, sample: VqaSample, prediction: str) -> float:
        return float(self.read(sample, prediction) in sample.answers)

    @property
    def task(self) -> str:
        return f"{self.kind}:{self.given}"

    def source(self) -> dict[str, str | None]:
        """Return `data_set`, `revision` (a commit of the hub, or None for a folder), `subset` and `split`."""
        return dict(self.rows.source)

    def __len__(self) -> int:
        return len(self.asked)

    def __iter__(self) -> Iterator[VqaSample]:
        """Yield the questions; images are converted as lmms-eval does: wide values are clipped, alpha is dropped."""
        for question, row in self._with_images():
            columns = self.images_of(question)
            images = [decode_image(row.image_bytes(column), row.place(column), clipped_rgb) for column in columns]
            yield replace(question, image=images[0] if images else None, further_images=tuple(images[1:]))

    def chance(self) -> float:
        """Return the percent that a random letter scores; open questions count as lost."""
        return 100.0 * sum(1 / len(each.choices) for each in self.asked if each.choices) / len(self.asked)

    def summarize(self, outcomes: pd.DataFrame) -> dict[str, float]:
        """Return accuracy by category, and `unparsable`: the number of answers in which nothing valid was found."""
        return {**category_accuracies(outcomes), "unparsable": self.unparsable(outcomes)}

    def unparsable(self, outcomes: pd.DataFrame) -> float:
        """Return the number of answers in which `read` finds nothing."""
        questions = {each.question_id: each for each in self.asked}
        said = zip(outcomes["question_id"], outcomes["prediction"], strict=True)
        return float(sum(self.read(questions[question_id], text) is None for question_id, text in said))

    @cached_property
    def digest(self) -> str:
        """As `Benchmark.digest`, over the stored bytes of the images: the same for every copy of the set."""
        key = (type(self).kind, self.version, len(self), self.rows.stamp())
        if key not in _DIGESTS:
            asked = [
                [
                    question.texts,
                    [hashlib.sha256(row.image_bytes(column)).hexdigest() for column in self.images_of(question)],
                ]
                for question, row in self._with_images()
            ]
            _DIGESTS[key] = digest([self.kind, self.version, self.max_new_tokens, asked])
        return _DIGESTS[key]

    def _with_images(self) -> Iterator[tuple[VqaSample, Row]]:
        return zip(self.asked, self.rows.read(self.image_columns, len(self)), strict=True)
