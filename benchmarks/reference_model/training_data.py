"""What each stage of the curriculum shows: drawn from the step number alone, so that a resumed run sees the same."""

import random
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from benchmarks.reference_model.sequences import Packed, Packer, Segment
from bivlm.reference.catalogue import ATTRIBUTES, creatures
from bivlm.reference.question_sets import DESCRIBE, Question, ask
from bivlm.reference.scenes import COLOURS, DIGITS, GRID, SHAPES, SIZES, Scene, caption, draw_scene, paint

# Chances of the four sets when a training question is drawn.
MIXTURE = {"perception": 0.21, "cognition": 0.24, "choice": 0.4, "open": 0.15}
# Within a set, in the order of `question_sets.FAMILIES`: what is learned late is shown more often.
FAMILY_WEIGHTS = {
    "perception": (0.5, 0.4, 2.0, 0.9, 1.5),
    "cognition": (1.0, 0.8, 1.7, 1.7),
    "choice": (0.5, 0.8, 1.0, 1.0, 1.0, 1.0),
    "open": (0.7, 0.3, 2.0, 0.5, 1.5, 1.5),
}
CAPTION_WEIGHT = 0.3  # of a caption's token beside an answer's: there are thirty of them to one answer
LIST_WEIGHT = 0.5
_CELLS = GRID * GRID
_CROWDED = (8, 12, 16)  # objects a scene in the vision stage: four scenes' worth of labels for the price of one

CELL_CLASSES = {"shape": len(SHAPES) + 1, "colour": len(COLOURS), "size": len(SIZES), "digit": len(DIGITS)}


@dataclass
class Batch:
    """`pixels` (B, 3, 128, 128) in [-1, 1] or None; `cells` per label (B, 16), -100 where meaningless; `packed`."""

    pixels: Tensor | None
    cells: dict[str, Tensor]
    packed: Packed | None

    def to(self, device: torch.device) -> "Batch":
        return Batch(
            None if self.pixels is None else self.pixels.to(device),
            {name: labels.to(device) for name, labels in self.cells.items()},
            None if self.packed is None else self.packed.to(device),
        )


def pixels_of(scenes: list[Scene]) -> Tensor:
    """What the image processor makes of the images: float32 (B, 3, 128, 128) in [-1, 1]."""
    images = torch.from_numpy(np.stack([paint(scene) for scene in scenes]))
    return images.permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def cell_labels(scenes: list[Scene]) -> dict[str, Tensor]:
    """Per label (B, 16) class numbers; shape 0 is an empty cell, whose other labels are -100."""
    labels = {name: torch.full((len(scenes), _CELLS), 0 if name == "shape" else -100) for name in CELL_CLASSES}
    for index, scene in enumerate(scenes):
        for thing in scene.things:
            cell = (thing.row - 1) * GRID + thing.column - 1
            labels["shape"][index, cell] = 1 + SHAPES.index(thing.shape)
            labels["colour"][index, cell] = tuple(COLOURS).index(thing.colour)
            labels["size"][index, cell] = SIZES.index(thing.size)
            labels["digit"][index, cell] = thing.digit
    return labels


def vision_batch(step: int, size: int, seed: int) -> Batch:
    """Crowded scenes and ordinary ones, with the labels of their cells."""
    rng = random.Random(f"vision/{seed}/{step}")
    scenes = [draw_scene(rng, "train", _CROWDED if index % 4 else (2, 3, 4)) for index in range(size)]
    return Batch(pixels_of(scenes), cell_labels(scenes), None)


def _entry(rng: random.Random) -> Segment:
    """One creature's whole entry, as a statement to learn."""
    creature = rng.choice(creatures())
    text = ", ".join(creature[attribute] for attribute in ATTRIBUTES)
    return Segment(f"Describe a {creature.name}.", text, label="entry", early=True)


def _list(rng: random.Random, scene: Scene) -> Segment:
    """The objects in any order, named first: what has to be found by colour and shape, not by place."""
    things = rng.sample(scene.things, len(scene.things))
    text = "; ".join(f"{t.name} {t.digit} row {t.row} column {t.column}" for t in things)
    return Segment("List the objects.", text, LIST_WEIGHT, label="list", early=True)


def known_place(question: Question) -> int | None:
    """Where a question tells the truth: the last word of a true yes/no question, the right one of lettered options.

    To foretell the word before it is read is what makes comparing it easy.
    """
    if question.choices is not None:
        return question.text.index("\n", question.text.index(f"\n{question.target}. ") + 1) - 1
    return question.text.index("?") - 1 if question.target == "yes" else None


def _segments_of(name: str, asked: list[Question], learn_known: bool) -> list[Segment]:
    return [
        Segment(
            q.text,
            q.target,
            known=known_place(q) if learn_known else None,
            early=name == "open",
            truth=q.truth,
            label=f"{name}/{q.category}",
        )
        for q in asked
    ]


def scene_segments(rng: random.Random, scene: Scene, length: int, entries: float, learn_known: bool) -> list[Segment]:
    """The objects as a list, half of the time as a caption too, then catalogue entries (that share of the draws) and
    questions of all sets; no question twice.

    About `length` tokens of them, and some more: what does not fit a sequence is left out.
    """
    segments = [_list(rng, scene)]
    if rng.random() < 0.5:
        segments.append(Segment(DESCRIBE, caption(scene), CAPTION_WEIGHT, label="caption"))
    seen: set[str] = set()
    while len(segments) < length // 12:
        if rng.random() < entries:
            segments.append(_entry(rng))
            continue
        name = rng.choices(tuple(MIXTURE), tuple(MIXTURE.values()))[0]
        for segment in _segments_of(name, ask(rng, scene, name, FAMILY_WEIGHTS[name]), learn_known):
            if segment.user not in seen:
                seen.add(segment.user)
                segments.append(segment)
    return segments


def joint_batch(step: int, size: int, seed: int, packer: Packer, *, entries: float, split: str = "train") -> Batch:
    """Scenes with as many segments as fit. Beyond the train split only replies are targets."""
    rng = random.Random(f"joint/{split}/{seed}/{step}")
    scenes = [draw_scene(rng, split) for _ in range(size)]
    packed = packer.pack(
        [scene_segments(rng, scene, packer.length, entries, split == "train") for scene in scenes], image=True
    )
    return Batch(pixels_of(scenes), cell_labels(scenes), packed)
