"""A folder of your own questions: ``vqa:FOLDER`` with pictures and a ``data.jsonl``.

One JSON object a line:

============= ==================================================================================================
key           value
============= ==================================================================================================
`image`       path of a picture, relative to the folder and inside it
`question`    the text of the user turn
`answers`     list of accepted answers, at least one
`choices`     optional: list of 2 to 26 distinct options. They are appended to the question as "A. ..." lines with
              the request for a letter, and only the letter is right. `answers` may hold letters or texts of options;
              a letter that is also the text of another option is refused, because it could mean either.
`question_id` optional: distinct; the line number unless given
`category`    optional: accuracy is also reported per category
============= ==================================================================================================

A prediction is right if it equals an answer, both lower-cased, stripped of white space around and final punctuation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import ClassVar, Self

from bivlm.evaluation.answers import LETTERS, plain
from bivlm.evaluation.benchmark import Benchmark
from bivlm.sources.image_folders import Line, read_lines
from bivlm.sources.images import converts_as_clipped, open_picture
from bivlm.sources.samples import VqaSample
from bivlm.workspace.hashing import digest, file_digest

ASK_FOR_LETTER = "\nAnswer with the option's letter from the given choices directly."


@dataclass(frozen=True)
class Question:
    """A line of ``data.jsonl`` as it is asked; `answers` are letters when there are choices."""

    question_id: str
    picture: Path
    question: str
    answers: tuple[str, ...]
    choices: tuple[str, ...] | None
    category: str


@dataclass(frozen=True)
class VqaFolder(Benchmark):
    """The questions of a folder, scored by equality."""

    kind: ClassVar[str] = "vqa"
    argument: ClassVar[str] = "FOLDER"
    version: ClassVar[int] = 1

    folder: Path
    questions: tuple[Question, ...]
    max_new_tokens: int = 32

    @classmethod
    def load(cls, argument: str, limit: int | None) -> Self:
        """Reads and checks every line, whatever the limit; raises `InputError` naming file, line and key."""
        folder = Path(argument)
        first_line: dict[str, int] = {}
        questions = []
        for line in read_lines(folder):
            question = _read(line)
            if question.question_id in first_line:
                found = f"an id of its own; line {first_line[question.question_id]} has the same"
                line.complain("question_id", question.question_id, found)
            first_line[question.question_id] = line.number
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
        decode = lru_cache(maxsize=1)(open_picture)  # consecutive questions often share their picture
        for asked in self.questions:
            yield VqaSample(
                question_id=asked.question_id,
                image_id=asked.picture.relative_to(root).as_posix(),
                image=decode(asked.picture),
                question=asked.question,
                answers=asked.answers,
                choices=asked.choices,
                category=asked.category,
            )

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
        """As `Benchmark.digest`, over the files of the pictures, so that few must be decoded."""
        root = self.folder.resolve()
        pictures = {picture: _known_by(picture) for picture in {asked.picture for asked in self.questions}}
        asked = [
            {
                **vars(question),
                "picture": [question.picture.relative_to(root).as_posix(), *pictures[question.picture]],
            }
            for question in self.questions
        ]
        return digest([self.kind, self.version, self.max_new_tokens, asked])


def _known_by(picture: Path) -> list[str | int]:
    """The hash of a picture's file, and 2 where versions before the second conversion to RGB showed another picture."""
    return [file_digest(picture), *([] if converts_as_clipped(picture) else [2])]


def _read(line: Line) -> Question:
    line.check_keys(("image", "question", "answers"), ("choices", "question_id", "category"))
    question, answers, choices = line.text("question"), line.texts("answers"), None
    if "choices" in line.values:
        choices = _choices(line)
        answers = tuple(dict.fromkeys(_letter_of(line, answer, choices) for answer in answers))
        options = "".join(f"\n{name}. {option}" for name, option in zip(LETTERS, choices, strict=False))
        question += options + ASK_FOR_LETTER
    elif not all(map(plain, answers)):
        line.complain("answers", list(answers), "answers that are more than punctuation")
    return Question(
        question_id=line.text("question_id") if "question_id" in line.values else str(line.number),
        picture=line.picture(),
        question=question,
        answers=answers,
        choices=choices,
        category=line.text("category") if "category" in line.values else "",
    )


def _choices(line: Line) -> tuple[str, ...]:
    choices = line.texts("choices")
    if not 2 <= len(choices) <= len(LETTERS) or len({plain(choice) for choice in choices}) < len(choices):
        line.complain("choices", list(choices), f"2 to {len(LETTERS)} options, all different")
    return choices


def _letter_of(line: Line, answer: str, choices: tuple[str, ...]) -> str:
    """The letter that an answer means: by the text of an option, or as a letter."""
    letters = LETTERS[: len(choices)]
    said = plain(answer)
    readings = {name for name, choice in zip(letters, choices, strict=True) if plain(choice) == said}
    readings |= {name for name in letters if name.lower() == said}
    if not readings:
        line.complain("answers", answer, f"one of the letters {letters} or the text of an option in 'choices'")
    if len(readings) > 1:
        line.complain("answers", answer, "one meaning: it is a letter and the text of another option, which reword")
    return readings.pop()
