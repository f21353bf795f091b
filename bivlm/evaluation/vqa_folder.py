"""A folder of your own questions: ``vqa:FOLDER`` with images and a ``data.jsonl``.

One JSON object per line:

============= ==================================================================================================
key           value
============= ==================================================================================================
`image`       path of an image, relative to the folder and inside it
`question`    the text of the user turn
`answers`     list of accepted answers, at least one
`choices`     optional: list of 2 to 26 distinct options. They are appended to the question as "A. ..." lines with
              the request for a letter, and only the letter is right. `answers` may hold letters or texts of options;
              a letter that is also the text of another option is refused, because it could mean either.
`question_id` optional: distinct; the line number unless given
`category`    optional: accuracy is also reported per category
============= ==================================================================================================

A prediction is right if it equals an answer, both lower-cased, without white space around and final punctuation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import ClassVar, Self

from bivlm.evaluation.answers import ASK_FOR_LETTER, LETTERS, lettered, plain
from bivlm.evaluation.benchmark import Benchmark
from bivlm.sources.images import converts_as_clipped, open_image
from bivlm.sources.json_rows import read_folder
from bivlm.sources.rows import Row
from bivlm.sources.samples import VqaSample
from bivlm.workspace.hashing import digest, file_digest


@dataclass(frozen=True)
class VqaFolder(Benchmark):
    """The questions of a folder, scored by equality."""

    kind: ClassVar[str] = "vqa"
    argument: ClassVar[str] = "FOLDER"
    version: ClassVar[int] = 1

    folder: Path
    questions: tuple[VqaSample, ...]  # without their images
    max_new_tokens: int = 32

    @classmethod
    def load(cls, argument: str, limit: int | None) -> Self:
        """Read and check every line, whatever the limit; raises `InputError` naming file, line and key."""
        folder = Path(argument)
        first_line: dict[str, int] = {}
        questions = []
        for row in read_folder(folder):
            question = _read(row, folder.resolve())
            first = first_line.setdefault(question.question_id, row.number)
            if first != row.number:
                row.complain("question_id", f"an id of its own; line {first} has the same", question.question_id)
            questions.append(question)
        return cls(folder, tuple(questions[:limit]))

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def task(self) -> str:
        return f"{self.kind}:{self.folder}"

    def __len__(self) -> int:
        return len(self.questions)

    def __iter__(self) -> Iterator[VqaSample]:
        root = self.folder.resolve()
        decode = lru_cache(maxsize=1)(open_image)  # consecutive questions often share their image
        for question in self.questions:
            yield replace(question, image=decode(root / question.image_id))

    def chance(self) -> float:
        """Return the percent that a random letter scores, and to open questions the best constant answer."""
        letters = sum(1 / len(asked.choices) for asked in self.questions if asked.choices)
        accepted = Counter(
            said for asked in self.questions if not asked.choices for said in set(map(plain, asked.answers))
        )
        return 100.0 * (letters + max(accepted.values(), default=0)) / len(self.questions)

    def score(self, sample: VqaSample, prediction: str) -> float:
        return float(plain(prediction) in {plain(answer) for answer in sample.answers})

    @cached_property
    def digest(self) -> str:
        """As `Benchmark.digest`, over the files of the images, so that few must be decoded."""
        root = self.folder.resolve()
        known = {name: _image_identity(root / name) for name in {question.image_id for question in self.questions}}
        asked = []
        for question in self.questions:
            texts = question.texts
            name = texts.pop("image_id")
            asked.append(texts | {"picture": [name, *known[name]]})
        return digest([self.kind, self.version, self.max_new_tokens, asked])


def _image_identity(image: Path) -> list[str | int]:
    """Return the hash of an image's file, and 2 where the first version's conversion to RGB showed another image."""
    return [file_digest(image), *([] if converts_as_clipped(image) else [2])]


def _read(row: Row, root: Path) -> VqaSample:
    row.check_keys(("image", "question", "answers"), ("choices", "question_id", "category"))
    question, answers, choices = row.text("question"), row.texts("answers"), None
    if "choices" in row.values:
        choices = _choices(row)
        answers = tuple(dict.fromkeys(_letter_of(row, answer, choices) for answer in answers))
        question += lettered(choices) + ASK_FOR_LETTER
    elif not all(map(plain, answers)):
        row.complain("answers", "answers that are more than punctuation")
    return VqaSample(
        question_id=row.text("question_id") if "question_id" in row.values else str(row.number),
        image_id=row.image_path("image").relative_to(root).as_posix(),
        image=None,
        question=question,
        answers=answers,
        choices=choices,
        category=row.text("category") if "category" in row.values else "",
    )


def _choices(row: Row) -> tuple[str, ...]:
    choices = row.texts("choices")
    if not 2 <= len(choices) <= len(LETTERS) or len({plain(choice) for choice in choices}) < len(choices):
        row.complain("choices", f"2 to {len(LETTERS)} options, all different")
    return choices


def _letter_of(row: Row, answer: str, choices: tuple[str, ...]) -> str:
    """Return the letter that an answer means: by the text of an option, or as a letter."""
    letters = LETTERS[: len(choices)]
    said = plain(answer)
    readings = {name for name, choice in zip(letters, choices, strict=True) if plain(choice) == said}
    readings |= {name for name in letters if name.lower() == said}
    if not readings:
        row.complain("answers", f"one of the letters {letters} or the text of an option in 'choices'", answer)
    if len(readings) > 1:
        row.complain("answers", "one meaning: it is a letter and the text of another option, which reword", answer)
    return readings.pop()
