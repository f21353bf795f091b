"""VQA accuracy as VizWiz and VQA v2 score it: of ten people, three who agree with the model are enough.

The normalisation is that of the EvalAI servers, in its order: lower case, punctuation, number words, articles,
contractions. It is applied to the prediction and to the answers alike.

Sources: Antol et al., "VQA: Visual Question Answering", 2015 (the formula); Gurari et al., "VizWiz Grand Challenge",
2018; visualqa.org/evaluation (the normalisation).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

ENOUGH = 3  # people that must agree

_ARTICLES = frozenset(("a", "an", "the"))
_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {word: str(number) for number, word in enumerate(_DIGITS)} | {"none": "0"}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`!'
_FULL_STOP = re.compile(r"\.(?!\d)")  # one that does not begin decimals
_FULL_STOPS = int(re.UNICODE)  # only so many are dropped: the published code gives the flag in the place of the count

# Written without an apostrophe these mean the same. Forms that are words without it (we'll, she'd, I'd, were) stay out.
_CONTRACTED = tuple(
    """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've
    needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've
    somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've
    something'll that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't
    we'd've we've weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's
    who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll
    you're you've
    """.split()  # noqa: SIM905  ninety quoted words would be harder to read
)


def _spellings(contracted: str) -> set[str]:
    """Return every way to write it without one of its apostrophes; the published table has none without two."""
    return {
        contracted[:place] + contracted[place + 1 :] for place, character in enumerate(contracted) if character == "'"
    }


_CONTRACTIONS = {
    spelling: contracted
    for contracted in _CONTRACTED
    for spelling in _spellings(contracted)
    if spelling not in _CONTRACTED
} | {"somebody'd": "somebodyd"}  # the other way round, in the published table too


@lru_cache(maxsize=1 << 16)  # ten people give the same few words, and every model looks them up again
def normalise(answer: str) -> str:
    """Return the answer as it is compared."""
    text = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = _without_punctuation(text.replace("\n", " ").replace("\t", " ").strip())
    words = [_NUMBERS.get(word, word) for word in text.split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Return the share in [0, 1]: each answer is left out once, and of the others `ENOUGH` matches or more count fully.

    mean over i of min(1, #{j != i: answers[j] = prediction} / 3), after `normalise`.
    """
    said = normalise(prediction)
    matches = [normalise(answer) == said for answer in answers]
    others = [sum(matches) - match for match in matches]
    return sum(min(1.0, count / ENOUGH) for count in others) / len(answers)


def _without_punctuation(text: str) -> str:
    """Drop a mark that stands beside a space anywhere, everywhere; one that does not becomes a space."""
    cleaned = text
    for mark in _PUNCTUATION:
        cleaned = cleaned.replace(mark, "" if f"{mark} " in text or f" {mark}" in text else " ")
    return _FULL_STOP.sub("", cleaned, count=_FULL_STOPS)
