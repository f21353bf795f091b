"""A benchmark: questions, how an answer is scored, and what is reported of a set beside accuracy."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import cached_property
from typing import Any, ClassVar

import pandas as pd

from bivlm.errors import InputError
from bivlm.evaluation.metrics import category_accuracies
from bivlm.sources.samples import VqaSample
from bivlm.workspace.hashing import digest


class Benchmark(ABC):
    """One file in `bivlm.evaluation` holds one subclass; that is all a new benchmark needs.

    A task is written `kind:argument`, for example ``reference:open``. `version` enters the digest: raise it when the
    same questions are asked or scored in another way.
    """

    kind: ClassVar[str]
    argument: ClassVar[str]  # what stands after the colon, as the error messages show it
    version: ClassVar[int]

    max_new_tokens: int

    @classmethod
    @abstractmethod
    def load(cls, argument: str, limit: int | None) -> Benchmark:
        """Return the benchmark that `argument` names, its first `limit` questions; raises `InputError`."""

    @cached_property
    def name(self) -> str:
        """A short name, for tables: the kind, unless a benchmark has one of its own."""
        return self.kind

    @property
    @abstractmethod
    def task(self) -> str:
        """The task as it was requested."""

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of questions."""

    @abstractmethod
    def __iter__(self) -> Iterator[VqaSample]:
        """Yield the questions in order, those about one image together; images are made or read as needed."""

    @abstractmethod
    def score(self, sample: VqaSample, prediction: str) -> float:
        """Return how right an answer is, in [0, 1]."""

    def summarize(self, outcomes: pd.DataFrame) -> dict[str, float]:
        """Return figures of the set beside accuracy, from the columns `bivlm.evaluation.outcomes.COLUMNS`."""
        return category_accuracies(outcomes)

    def intervals(self, outcomes: pd.DataFrame) -> dict[str, list[float]]:
        """Return the 95 % intervals of those figures of `summarize` by which the set is known, if accuracy is not."""
        return {}

    def chance(self) -> float | None:
        """Return the percent that an answer without looking scores; None where it is unknown."""
        return None

    def source(self) -> dict[str, Any] | None:
        """Return where the questions were published, and in which revision; None where the task says all."""
        return None

    @classmethod
    def subclasses(cls) -> Iterator[type[Benchmark]]:
        """Yield every class below this one."""
        for each in cls.__subclasses__():
            yield from (each, *each.subclasses())

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the kind, its version, and the content of every question and image: for step keys."""
        asked = [
            [
                sample.texts,
                *([image.mode, image.size, hashlib.sha256(image.tobytes()).hexdigest()] for image in sample.images),
            ]
            for sample in self
        ]
        return digest([self.kind, self.version, self.max_new_tokens, asked])


def benchmark_kinds() -> dict[str, type[Benchmark]]:
    """Return every kind of benchmark by the name that a task begins with."""
    package = importlib.import_module("bivlm.evaluation")
    for module in pkgutil.iter_modules(package.__path__):
        if module.name != "lmms_eval":  # no benchmark, and it needs an extra
            importlib.import_module(f"bivlm.evaluation.{module.name}")
    return {cls.kind: cls for cls in Benchmark.subclasses() if not inspect.isabstract(cls)}


def load_benchmark(task: str, limit: int | None = None) -> Benchmark:
    """Return the benchmark of a task such as ``reference:open`` or ``vqa:FOLDER``, its first `limit` questions or all.

    Raises `InputError` on an unknown task, a limit below 1, and whatever the benchmark finds wrong.
    """
    kinds = benchmark_kinds()
    kind, colon, argument = task.partition(":")
    if kind not in kinds or not colon or not argument:
        valid = ", ".join(f"{name}:{kinds[name].argument}" for name in sorted(kinds))
        raise InputError(f"evaluation task {task!r} is not known; valid: {valid}")
    if limit is not None and limit < 1:
        raise InputError(f"limit of {task}: found {limit}, expected 1 or more questions")
    return kinds[kind].load(argument, limit)
