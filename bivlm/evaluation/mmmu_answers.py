"""Read answers to MMMU as the benchmark publishes it, and lmms-eval after it. Pure functions of strings.

Source: github.com/MMMU-Benchmark/MMMU, eval/eval_utils.py. One thing is left out: where no option is found, the
published code guesses one at random.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from bivlm.evaluation.answers import LETTERS

Reading = str | float

_WORDS_OF_A_SENTENCE = 5  # in a longer answer options are looked for by their text
_AROUND = ",.!?;:'"
_BEFORE_THE_ANSWER = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),  # with commas between thousands
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),  # scientific
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),  # plain
)


def option_letter(text: str, options: Sequence[str]) -> str | None:
    """Return the letter of the option that an answer means, or None.

    The first of these forms that occurs decides: "(B)"; "B" before a space or at the end, even as the end of a word;
    "B."; and in answers of more than five words the text of an option, whatever its case. Of several options the one
    wins that occurs last: in brackets, by its text, and otherwise with a space on either side; the first of them if
    none does.
    """
    for mark in _AROUND:  # one after the other, as published: "B.'" loses both marks, "B'." the full stop alone
        text = text.strip(mark)
    text = f" {text} "
    letters = LETTERS[: len(options)]
    for form, last in (("({})", "({})"), ("{} ", " {} "), ("{}.", " {} ")):
        found = [letter for letter in letters if form.format(letter) in text]
        if found:
            return _named_last(text, {letter: last.format(letter) for letter in found})
    if len(text.split()) <= _WORDS_OF_A_SENTENCE:
        return None
    lower = text.lower()
    named = {letter: option.lower() for letter, option in zip(letters, options, strict=True) if option.lower() in lower}
    return _named_last(lower, named) if named else None


def _named_last(text: str, names: Mapping[str, str]) -> str:
    """Return the letter whose name occurs last in `text`; the first letter if none does."""
    return max(names, key=lambda letter: text.rfind(names[letter]))


def open_readings(text: str) -> set[Reading]:
    """Return what an open answer says: its lines, or what follows words such as "is" in them, and the numbers in these.

    Texts are in lower case, numbers rounded to two places.
    """
    parts = _parts_with_an_answer(text)
    numbers = [number for part in parts for form in _NUMBERS for number in form.findall(part)]
    return {reading for said in (*parts, *numbers) for reading in normalised(said)}


def is_among(readings: set[Reading], answers: Sequence[str]) -> bool:
    """Return whether an open answer is right: a text of it holds one of `answers`, or a number equals one."""
    right = [reading for answer in answers for reading in normalised(answer)]
    texts = [reading for reading in right if isinstance(reading, str)]
    return any(
        any(text in reading for text in texts) if isinstance(reading, str) else reading in right for reading in readings
    )


def normalised(text: str) -> list[Reading]:
    """Return a number, rounded to two places; else the text in lower case, one character with a space at a side."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
    return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def _parts_with_an_answer(text: str) -> list[str]:
    """Return of every line the shortest rest after a word that announces an answer; the whole text if none does."""
    text = text.strip().strip(".").lower()
    lines = text.split("\n")
    parts = []
    for number, line in enumerate(lines, start=1):
        announcing = (*_BEFORE_THE_ANSWER, "=") if number == len(lines) else _BEFORE_THE_ANSWER
        rests = [line.split(word)[-1].strip() for word in announcing if word in line]
        shortest = _shortest(rests)
        if shortest and shortest not in _TRIVIAL:
            parts.append(shortest)
    return parts or [text]


_TRIVIAL = frozenset((":", ",", ".", "!", "?", ";", "'"))


def _shortest(rests: Sequence[str]) -> str:
    """Return the first of the shortest; one that is empty makes the next one count, as published."""
    shortest = ""
    for rest in rests:
        if not shortest or len(rest) < len(shortest):
            shortest = rest
    return shortest
