"""What each stage of the curriculum shows: drawn from the step number alone, so that a resumed run sees the same."""

import random
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bivlm.reference.catalogue import ATTRIBUTES, creatures
from bivlm.reference.question_sets import (
    DESCRIBE,
    FAMILIES,
    QUESTION_SETS,
    ask,
)
from bivlm.reference.scenes import COLOURS, DIGITS, GRID, SHAPES, SIZES, Scene, caption, draw_scene, paint
from bivlm.reference.sequences import Packed, Packer, Segment

# Chances of the four sets when a training question is drawn.
MIXTURE = {"perception": 0.25, "cognition": 0.25, "choice": 0.25, "open": 0.25}
CAPTION_WEIGHT = 0.5  # of a caption's token beside an answer's: there are thirty of them to one answer
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
    """What the image processor makes of the pictures: float32 (B, 3, 128, 128) in [-1, 1]."""
    pictures = torch.from_numpy(np.stack([paint(scene) for scene in scenes]))
    return pictures.permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


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
    return Segment(f"Describe a {creature.name}.", text, label="entry")


def _recall_families() -> list[tuple[str, object]]:
    """The families that need no picture."""
    return [(name, f) for name in QUESTION_SETS for f in FAMILIES[name] if "_recall" in f.__qualname__]


def text_batch(step: int, size: int, seed: int, packer: Packer, entries: float = 0.4) -> Batch:
    """Catalogue entries (that share of the draws) and catalogue questions, without a picture."""
    rng = random.Random(f"text/{seed}/{step}")
    families = _recall_families()
    scene = draw_scene(rng, "train")
    batch = []
    for _ in range(size):
        row: list[Segment] = []
        while len(row) < packer.length // 12:
            if rng.random() < entries:
                row.append(_entry(rng))
            else:
                name, family = rng.choice(families)
                row.extend(Segment(q.text, q.target, label=f"{name}/{q.category}") for q in family(rng, scene))
        rng.shuffle(row)
        batch.append(row)
    return Batch(None, {}, packer.pack(batch, image=False))


def scene_segments(rng: random.Random, scene: Scene, count: int) -> list[Segment]:
    """The caption, sometimes a catalogue entry, and questions of all sets; no question twice."""
    segments = [Segment(DESCRIBE, caption(scene), CAPTION_WEIGHT, "caption")]
    if rng.random() < 0.3:
        segments.append(_entry(rng))
    seen: set[str] = set()
    for _ in range(count):
        name = rng.choices(tuple(MIXTURE), tuple(MIXTURE.values()))[0]
        for question in ask(rng, scene, name):
            if question.text not in seen:
                seen.add(question.text)
                segments.append(Segment(question.text, question.target, label=f"{name}/{question.category}"))
    return segments


def joint_batch(step: int, size: int, seed: int, packer: Packer, split: str = "train") -> Batch:
    """Scenes with as many segments as fit."""
    rng = random.Random(f"joint/{split}/{seed}/{step}")
    scenes = [draw_scene(rng, split) for _ in range(size)]
    # About 18 tokens a question with its answer; a few too many are drawn, what does not fit is left out.
    count = packer.length // 16
    packed = packer.pack([scene_segments(rng, scene, count) for scene in scenes], image=True)
    return Batch(pixels_of(scenes), cell_labels(scenes), packed)
