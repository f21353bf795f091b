"""ScienceQA, the questions with an image: multiple choice with a hint; ``scienceqa:hub`` or a copy of it.

Lu et al., "Learn to Explain: Multimodal Reasoning via Thought Chains for Science Question Answering", 2022.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from bivlm.evaluation.answers import ASK_FOR_LETTER, LETTERS, lettered
from bivlm.evaluation.published import PublishedSet
from bivlm.sources.parquet_rows import Layout
from bivlm.sources.rows import Row
from bivlm.sources.samples import VqaSample


@dataclass(frozen=True)
class ScienceQa(PublishedSet):
    """The share of questions whose answer is the right letter."""

    kind: ClassVar[str] = "scienceqa"
    version: ClassVar[int] = 1
    layout: ClassVar[Layout] = Layout("lmms-lab-encoder/ScienceQA", "ScienceQA-IMG", ("test",))
    columns: ClassVar[tuple[str, ...]] = ("question", "hint", "choices", "answer")
    optional: ClassVar[tuple[str, ...]] = ("subject",)

    max_new_tokens: int = 16

    @classmethod
    def ask(cls, row: Row) -> VqaSample:
        choices = row.texts("choices", may_be_empty=True)
        if len(choices) > len(LETTERS):
            row.complain("choices", f"at most {len(LETTERS)}")
        answer = row.values["answer"]
        if type(answer) is not int or not 0 <= answer < len(choices):
            row.complain("answer", f"the number of a choice, 0 to {len(choices) - 1}")
        hint = row.text("hint", may_be_empty=True)
        context = f"Context: {hint}\n" if hint else ""
        return VqaSample(
            question_id=str(row.number),
            image_id=str(row.number),
            image=None,
            question=f"{context}{row.text('question')}{lettered(choices)}{ASK_FOR_LETTER}",
            answers=(LETTERS[answer],),
            choices=choices,
            category=row.text("subject", may_be_empty=True),
        )

    def read(self, question: VqaSample, prediction: str) -> str | None:
        """Return the letter that is the whole text, in either case, or a capital that begins it before a full stop."""
        said = prediction.strip()
        if len(said) >= 2 and said[0].isupper() and said[1] == ".":
            said = said[0]
        letters = LETTERS[: len(question.choices or ())].lower()
        return said.lower().upper() if len(said) == 1 and said.lower() in letters else None
