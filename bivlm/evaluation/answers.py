"""Ask for an answer of one form, and read a model's text as it: yes or no, a letter, or a plain answer."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence

FINAL_PUNCTUATION = ".,;:!?…。，！？"
LETTERS = string.ascii_uppercase
ASK_FOR_LETTER = "\nAnswer with the option's letter from the given choices directly."
ASK_FOR_WORD = "\nAnswer the question using a single word or phrase."


def lettered(choices: Sequence[str]) -> str:
    """Return the options of a question as lines: "A. red", "B. blue"; each begins with a line break."""
    return "".join(f"\n{name}. {choice}" for name, choice in zip(LETTERS, choices, strict=False))


def plain(text: str) -> str:
    """Return the text lower-cased, without white space around it and final punctuation (`FINAL_PUNCTUATION`)."""
    return text.strip().rstrip(FINAL_PUNCTUATION + string.whitespace).lower()


def yes_or_no(text: str) -> str | None:
    """Return "yes", "no", or None for anything else.

    The rule of MME as commonly scored: without full stops the text is exactly yes, no, y or n, or yes (before no)
    stands within its first four characters.
    """
    said = text.lower().strip().replace(".", "")
    if said in ("y", "n"):
        return {"y": "yes", "n": "no"}[said]
    start = said[:4]
    return next((word for word in ("yes", "no") if word in start), None)


def letter(text: str, count: int) -> str | None:
    """Return the option letter (the first `count` of A, B, C, ...) that the text names, or None.

    The first of these forms that occurs decides, and its last occurrence wins: "(B)"; "B." or "B)" or "B:"; "B" as a
    word of its own. Lower case counts only when the letter is the whole text. Where no letter is found, the published
    rule of MMMU guesses at random; this one does not, and the question is wrong.
    """
    letters = LETTERS[:count]
    alone = plain(text).strip("()").upper()
    if len(alone) == 1 and alone in letters:
        return alone
    for form in (rf"\(([{letters}])\)", rf"(?<!\w)([{letters}])[.):](?!\w)", rf"(?<![\w'])([{letters}])(?![\w'])"):
        found = re.findall(form, text)
        if found:
            return found[-1]
    return None
