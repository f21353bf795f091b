"""Four question sets about generated scenes, shaped like MME (perception, cognition), ScienceQA and VizWiz.

Every question has a *family* (its category). A family function takes a random source and a scene and returns
questions, or none when the scene does not lend itself to it. Yes/no families return a pair: one question whose answer
is yes and one whose answer is no, otherwise alike. Wrong answers are drawn so that the text alone does not tell.
"""

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

from bivlm.reference.catalogue import ATTRIBUTES, VALUES, creatures
from bivlm.reference.scenes import (
    COLOURS,
    DIGITS,
    GRID,
    SHAPES,
    Scene,
    Thing,
    caption,
    draw_scene,
    render,
    require_split,
)
from bivlm.sources.samples import CalibrationSample, VqaSample

QUESTION_SETS = ("perception", "cognition", "choice", "open")
TEST_QUESTIONS = 2000  # per set

YES_NO = "\nPlease answer yes or no."
LETTER = "\nAnswer with the option's letter from the given choices directly."
PHRASE = (
    "\nWhen the provided information is insufficient, respond with 'Unanswerable'."
    "\nAnswer the question using a single word or phrase."
)
DESCRIBE = "Describe the image."
UNANSWERABLE = "unanswerable"
LETTERS = "ABCD"

_LOOK = "Hint: look at the picture.\n"
_RECALL = "Hint: recall the catalogue.\n"
_STATEMENT = {"home": "live in", "food": "eat", "trade": "work as a"}
_LOOKS = {"colour": tuple(COLOURS), "shape": SHAPES, "digit": DIGITS}
_ABOUT = {
    "colour": "What colour is the {0.shape}?",
    "shape": "What shape is {0.colour}?",
    "digit": "What digit is on the {0.name}?",
}
_ASK = {"home": "Where does a {} live?", "food": "What does a {} eat?", "trade": "What does a {} work as?"}
_NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@dataclass(frozen=True)
class Question:
    """A question without its image; the fields are those of `VqaSample`."""

    text: str
    answers: tuple[str, ...]
    category: str
    choices: tuple[str, ...] | None = None
    truth: str | None = None  # the word that a yes/no or lettered question is really about, for the training

    @property
    def target(self) -> str:
        """The answer that the model is taught: the most frequent one."""
        return max(self.answers, key=self.answers.count)


Family = Callable[[random.Random, Scene], list[Question]]
Value = TypeVar("Value", str, int)


def _pair(
    rng: random.Random,
    category: str,
    text: str,
    yes: object,
    no: object,
    *,
    truths: tuple[object, object] = (None, None),
) -> list[Question]:
    """Return `text` filled in for a yes and for a no, in random order; `truths` are what the answers follow from."""
    pair = [
        Question(text.format(fill) + YES_NO, (answer,), category, truth=None if truth is None else str(truth))
        for fill, answer, truth in ((yes, "yes", truths[0]), (no, "no", truths[1]))
    ]
    rng.shuffle(pair)
    return pair


def _other(rng: random.Random, values: Iterable[Value], value: Value) -> Value:
    """Return a random member of `values` other than `value`."""
    return rng.choice([v for v in values if v != value])


def _absent(rng: random.Random, scene: Scene) -> str:
    """Return the name of an object that is not there, usually made of a colour and a shape that are."""
    present = {thing.name for thing in scene.things}
    colours, shapes = [t.colour for t in scene.things], [t.shape for t in scene.things]
    while True:
        colour = rng.choice(colours if rng.random() < 0.7 else tuple(COLOURS))
        shape = rng.choice(shapes if rng.random() < 0.7 else SHAPES)
        if f"{colour} {shape}" not in present:
            return f"{colour} {shape}"


def _existence(rng: random.Random, scene: Scene) -> list[Question]:
    thing = rng.choice(scene.things)
    return _pair(rng, "existence", "Is there a {} in the image?", thing.name, _absent(rng, scene))


def _alone(rng: random.Random, scene: Scene, attribute: str) -> Thing | None:
    """Return a random object that a question about `attribute` fits alone, see `_ABOUT`; None if there is none."""
    named = "shape" if attribute == "colour" else "colour" if attribute == "shape" else "name"
    names = [getattr(thing, named) for thing in scene.things]
    things = [thing for thing in scene.things if names.count(getattr(thing, named)) == 1]
    return rng.choice(things) if things else None


def _colour(rng: random.Random, scene: Scene) -> list[Question]:
    if (thing := _alone(rng, scene, "colour")) is None:
        return []
    others = [t.colour for t in scene.things if t.colour != thing.colour] or list(COLOURS)
    wrong = _other(rng, others if rng.random() < 0.5 else tuple(COLOURS), thing.colour)
    return _pair(rng, "color", f"Is the {thing.shape} {{}}?", thing.colour, wrong, truths=(thing.colour, thing.colour))


def _position(rng: random.Random, scene: Scene) -> list[Question]:
    thing = rng.choice(scene.things)
    axis = rng.choice(("row", "column"))
    right = getattr(thing, axis)
    wrong = _other(rng, range(1, GRID + 1), right)
    return _pair(rng, "position", f"Is the {thing.name} in {axis} {{}}?", right, wrong, truths=(right, right))


def _count(rng: random.Random, scene: Scene) -> list[Question]:
    # The same number is asked of two colours, so that no number makes a yes likelier.
    counts = {colour: len(scene.find(colour=colour)) for colour in {t.colour: None for t in scene.things}}
    options = [(this, other) for this in counts for other in counts if counts[this] != counts[other]]
    if not options:
        return []
    this, other = rng.choice(options)
    text = f"Is the number of {{}} objects {counts[this]}?"
    return _pair(rng, "count", text, this, other, truths=(counts[this], counts[other]))


def _reading(rng: random.Random, scene: Scene) -> list[Question]:
    thing = rng.choice(scene.things)
    others = [t.digit for t in scene.things if t.digit != thing.digit] or list(DIGITS)
    wrong = _other(rng, others if rng.random() < 0.5 else DIGITS, thing.digit)
    text = f"Is the digit on the {thing.name} {{}}?"
    return _pair(rng, "OCR", text, thing.digit, wrong, truths=(thing.digit, thing.digit))


def _fact(rng: random.Random, attribute: str) -> tuple[str, str]:
    creature = rng.choice(creatures())
    return creature.name, creature[attribute]


def _recall_yes_no(attribute: str) -> Family:
    def family(rng: random.Random, scene: Scene) -> list[Question]:
        name, value = _fact(rng, attribute)
        text, wrong = f"Does a {name} {_STATEMENT[attribute]} {{}}?", _other(rng, VALUES[attribute], value)
        return _pair(rng, f"catalogue_{attribute}", text, value, wrong, truths=(value, value))

    return family


def _comparison(rng: random.Random, scene: Scene) -> list[Question]:
    # Both questions name the same number, so that the number alone says nothing.
    options = [(high, low) for high in scene.things for low in scene.things if high.digit > low.digit]
    if not options:
        return []
    high, low = rng.choice(options)
    text = f"Is the digit on the {{}} greater than {rng.randrange(low.digit, high.digit)}?"
    return _pair(rng, "numerical_comparison", text, high.name, low.name, truths=(high.digit, low.digit))


def _parity(rng: random.Random, scene: Scene) -> list[Question]:
    thing = rng.choice(scene.things)
    right, wrong = ("even", "odd") if thing.digit % 2 == 0 else ("odd", "even")
    text = f"Is the digit on the {thing.name} {{}}?"
    return _pair(rng, "numerical_parity", text, right, wrong, truths=(right, right))


def _lettered(rng: random.Random, category: str, hint: str, text: str, right: str, wrong: list[str]) -> list[Question]:
    options = [right, *wrong]
    rng.shuffle(options)
    lines = "".join(f"\n{letter}. {option}" for letter, option in zip(LETTERS, options, strict=True))
    letter = LETTERS[options.index(right)]
    return [Question(hint + text + lines + LETTER, (letter,), category, tuple(options), right)]


def _distractors(rng: random.Random, right: Value, present: Iterable[Value], values: Iterable[Value]) -> list[str]:
    """Return three wrong options: what the other objects show comes first, so that seeing it is not enough."""
    near = [v for v in dict.fromkeys(present) if v != right]
    rng.shuffle(near)
    far = [v for v in values if v != right and v not in near]
    return [str(v) for v in (near + rng.sample(far, len(far)))[: len(LETTERS) - 1]]


def _choose(attribute: str) -> Family:
    def family(rng: random.Random, scene: Scene) -> list[Question]:
        if (thing := _alone(rng, scene, attribute)) is None:
            return []
        right = getattr(thing, attribute)
        wrong = _distractors(rng, right, [getattr(t, attribute) for t in scene.things], _LOOKS[attribute])
        return _lettered(rng, attribute, _LOOK, _ABOUT[attribute].format(thing), str(right), wrong)

    return family


def _recall_choice(attribute: str) -> Family:
    def family(rng: random.Random, scene: Scene) -> list[Question]:
        name, value = _fact(rng, attribute)
        wrong = rng.sample([v for v in VALUES[attribute] if v != value], len(LETTERS) - 1)
        return _lettered(rng, f"catalogue_{attribute}", _RECALL, _ASK[attribute].format(name), value, wrong)

    return family


def _ten_answers(rng: random.Random, answer: str, variants: tuple[str, ...]) -> tuple[str, ...]:
    """Return ten people's answers: at least six agree, the others use another word or give up."""
    minority = rng.choice((0, 0, 0, 1, 2, 3, 4))
    answers = [answer] * (10 - minority) + [rng.choice(variants) for _ in range(minority)]
    rng.shuffle(answers)
    return tuple(answers)


def _open(rng: random.Random, category: str, text: str, answer: str, variants: tuple[str, ...]) -> list[Question]:
    return [Question(text + PHRASE, _ten_answers(rng, answer, variants * 4 + (UNANSWERABLE,)), category)]


def _open_look(attribute: str, variant: str) -> Family:
    def family(rng: random.Random, scene: Scene) -> list[Question]:
        if (thing := _alone(rng, scene, attribute)) is None:
            return []
        text, answer = _ABOUT[attribute].format(thing), str(getattr(thing, attribute))
        return _open(rng, attribute, text, answer, (variant.format(thing),))

    return family


def _open_count(rng: random.Random, scene: Scene) -> list[Question]:
    number = len(scene.things)
    return _open(rng, "count", "How many objects are there?", str(number), (f"{_NUMBER_WORDS[number]} objects",))


def _open_recall(rng: random.Random, scene: Scene) -> list[Question]:
    attribute = rng.choice(ATTRIBUTES)
    name, value = _fact(rng, attribute)
    return _open(rng, "catalogue", _ASK[attribute].format(name), value, (f"{value} perhaps",))


def _open_unanswerable(rng: random.Random, scene: Scene) -> list[Question]:
    kind = rng.randrange(3)
    if kind == 0:
        text = f"What digit is on the {_absent(rng, scene)}?"
    elif kind == 1:
        text = f"What colour is the {rng.choice([s for s in SHAPES if not scene.find(shape=s)])}?"
    else:
        text = f"What shape is {rng.choice([c for c in COLOURS if not scene.find(colour=c)])}?"
    return [Question(text + PHRASE, _ten_answers(rng, UNANSWERABLE, ("unsuitable image", "not there")), UNANSWERABLE)]


FAMILIES: dict[str, tuple[Family, ...]] = {
    "perception": (_existence, _colour, _position, _count, _reading),
    "cognition": (_comparison, _parity, *(_recall_yes_no(fact) for fact in ("home", "trade"))),
    "choice": (*(_choose(look) for look in _LOOKS), *(_recall_choice(fact) for fact in ATTRIBUTES)),
    "open": (
        _open_look("colour", "dark {0.colour}"),
        _open_look("shape", "{0.colour} {0.shape}"),
        _open_look("digit", "number {0.digit}"),
        _open_count,
        _open_recall,
        _open_unanswerable,
    ),
}


def require_set(name: str) -> None:
    """Raise ValueError on a question set that does not exist."""
    if name not in QUESTION_SETS:
        raise ValueError(f"question set is {name!r}, valid are {', '.join(QUESTION_SETS)}")


def ask(rng: random.Random, scene: Scene, name: str, weights: Sequence[float] | None = None) -> list[Question]:
    """Return questions of one random family of the set: a pair (yes and no) for perception and cognition, else one.

    `weights`, one per family, make some likelier (in training); without them all are equally likely.
    """
    while True:
        family = rng.choice(FAMILIES[name]) if weights is None else rng.choices(FAMILIES[name], weights)[0]
        asked = family(rng, scene)
        if asked:
            return asked


def _scene_questions(name: str, split: str, seed: int) -> Iterator[tuple[int, Scene, Question]]:
    """Yield (image number, scene, question) without end; each image has a random source of its own."""
    image = 0
    while True:
        rng = random.Random(f"{split}/{name}/{seed}/{image}")
        scene = draw_scene(rng, split)
        for question in ask(rng, scene, name):
            yield image, scene, question
        image += 1


def questions(name: str, *, split: str = "test", limit: int | None = None, seed: int = 0) -> Iterator[VqaSample]:
    """Yield the questions of a set, always the same for the same arguments.

    Without a `limit` there are 2,000. In perception and cognition two consecutive questions share an image, one of
    them answered by yes and the other by no. Raises ValueError on an unknown set or split.
    """
    require_set(name)
    require_split(split)
    return _samples(name, split, TEST_QUESTIONS if limit is None else limit, seed)


def _samples(name: str, split: str, limit: int, seed: int) -> Iterator[VqaSample]:
    shown, drawn = -1, None
    for index, (image, scene, question) in zip(range(limit), _scene_questions(name, split, seed), strict=False):
        if image != shown:
            shown, drawn = image, render(scene)
        yield VqaSample(
            question_id=f"{name}-{split}-{seed}-{index:05d}",
            image_id=f"{name}-{split}-{seed}-{image:05d}",
            image=drawn,
            question=question.text,
            answers=question.answers,
            choices=question.choices,
            category=question.category,
        )


def questions_alone(name: str) -> list[Question]:
    """Return the 2,000 test questions of a set without their images; raises ValueError on an unknown set."""
    require_set(name)
    return [question for _, _, question in islice(_scene_questions(name, "test", 0), TEST_QUESTIONS)]


def calibration_samples(n: int, seed: int) -> list[CalibrationSample]:
    """Return `n` samples of the calibration split: the four sets in turn, and scene captions as the fifth kind."""
    samples = []
    for index in range(n):
        rng = random.Random(f"conversation/{seed}/{index}")
        scene = draw_scene(rng, "calibration")
        kind = (*QUESTION_SETS, "caption")[index % (len(QUESTION_SETS) + 1)]
        if kind == "caption":
            user, assistant = DESCRIBE, caption(scene)
        else:
            question = rng.choice(ask(rng, scene, kind))
            user, assistant = question.text, question.target
        samples.append(CalibrationSample(render(scene), user, assistant))
    return samples


def text_only_samples(seed: int) -> Iterator[CalibrationSample]:
    """Yield samples without an image: all facts about a creature and a question about one fact, in turn.

    The catalogue is the only thing that the model learns without an image: it gives three quarters of the tokens
    of all facts and two thirds of those of one fact when it sees none, against two fifths of a scene's caption. No
    sample comes twice; there are 3,000.
    """
    rng = random.Random(f"text/{seed}")
    facts = [(creature, attribute) for creature in creatures() for attribute in ATTRIBUTES]
    whole = rng.sample(creatures(), len(creatures()))
    for described, (asked, attribute) in zip(whole, rng.sample(facts, len(facts)), strict=False):
        all_facts = ", ".join(described[attribute] for attribute in ATTRIBUTES)
        yield CalibrationSample(None, f"Describe a {described.name}.", all_facts)
        yield CalibrationSample(None, _ASK[attribute].format(asked.name) + PHRASE, asked[attribute])
