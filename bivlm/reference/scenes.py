"""Scenes of at most four numbered objects on a 4 x 4 grid, and their images.

A scene belongs to exactly one split: a checksum of its contents says which, and the generator of a split draws until
the scene is its own. Two splits can therefore never share a scene, whatever their seeds.
"""

import random
import zlib
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

GRID = 4
CELL = 32  # pixels; two patches of 16
SIDE = GRID * CELL

SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross")
COLOURS = {
    "red": (215, 40, 40),
    "green": (40, 150, 60),
    "blue": (40, 80, 220),
    "yellow": (225, 190, 30),
    "purple": (135, 60, 175),
    "orange": (240, 125, 30),
    "cyan": (50, 185, 205),
    "black": (35, 35, 35),
}
SIZES = ("small", "large")
DIGITS = tuple(range(10))
SPLITS = ("train", "calibration", "test")

_BUCKETS = 16  # of the checksum: 0 is test, 1 is calibration, the others are train
_SUPERSAMPLING = 4


@dataclass(frozen=True)
class Thing:
    """One object: its looks, the digit on it, and its cell counted from 1."""

    shape: str
    colour: str
    size: str
    digit: int
    row: int
    column: int

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """Objects in raster order (row by row) and the seed of the image's background, noise and jitter."""

    things: tuple[Thing, ...]
    seed: int

    def find(self, colour: str | None = None, shape: str | None = None) -> tuple[Thing, ...]:
        """Return the objects of this colour and this shape; None stands for any."""
        return tuple(t for t in self.things if colour in (None, t.colour) and shape in (None, t.shape))


def split_of(scene: Scene) -> str:
    """Return the one split that a scene belongs to; the image's seed plays no part."""
    bucket = zlib.crc32(repr(scene.things).encode()) % _BUCKETS
    return {0: "test", 1: "calibration"}.get(bucket, "train")


def require_split(split: str) -> None:
    """Raise ValueError on a split that does not exist."""
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}, valid are {', '.join(SPLITS)}")


def _draw_thing(rng: random.Random, cell: int, earlier: list[Thing]) -> Thing:
    # A colour or shape seen before is repeated often, so that "the red one" alone rarely says which.
    colour = rng.choice(earlier).colour if earlier and rng.random() < 0.3 else rng.choice(tuple(COLOURS))
    shape = rng.choice(earlier).shape if earlier and rng.random() < 0.3 else rng.choice(SHAPES)
    return Thing(shape, colour, rng.choice(SIZES), rng.choice(DIGITS), cell // GRID + 1, cell % GRID + 1)


def draw_scene(rng: random.Random, split: str, counts: tuple[int, ...] = (2, 3, 4)) -> Scene:
    """Return a random scene of `split`, with as many objects as one of `counts`; no two share both colour and shape."""
    require_split(split)
    while True:
        things: list[Thing] = []
        for cell in sorted(rng.sample(range(GRID * GRID), rng.choice(counts))):
            thing = _draw_thing(rng, cell, things)
            while len(things) < len(SHAPES) * len(COLOURS) and any(thing.name == other.name for other in things):
                thing = _draw_thing(rng, cell, things)
            things.append(thing)
        scene = Scene(tuple(things), rng.getrandbits(32))
        if split_of(scene) == split:
            return scene


def caption(scene: Scene) -> str:
    """Return the whole scene in words, in raster order."""
    return "; ".join(f"row {t.row} column {t.column}: {t.size} {t.name} {t.digit}" for t in scene.things)


def _outline(shape: str, radius: float) -> list[tuple[float, float]]:
    """Return the corners of a shape around the origin."""
    if shape == "square":
        side = 0.88 * radius
        return [(-side, -side), (side, -side), (side, side), (-side, side)]
    if shape == "triangle":
        return [(0, -1.05 * radius), (1.08 * radius, 0.9 * radius), (-1.08 * radius, 0.9 * radius)]
    if shape == "diamond":
        return [(0, -1.1 * radius), (1.1 * radius, 0), (0, 1.1 * radius), (-1.1 * radius, 0)]
    if shape == "star":
        points = []
        for corner in range(10):
            angle, reach = np.pi * (corner / 5 - 0.5), (1.12 if corner % 2 == 0 else 0.55) * radius
            points.append((float(np.cos(angle) * reach), float(np.sin(angle) * reach)))
        return points
    if shape == "cross":
        arm, reach = 0.42 * radius, 1.02 * radius
        return [(-arm, -reach), (arm, -reach), (arm, -arm), (reach, -arm), (reach, arm), (arm, arm),
                (arm, reach), (-arm, reach), (-arm, arm), (-reach, arm), (-reach, -arm), (-arm, -arm)]  # fmt: skip
    raise ValueError(f"shape is {shape!r}, valid are {', '.join(SHAPES)}")


@cache
def _sprite(shape: str, colour: str, size: str, digit: int) -> tuple[np.ndarray, np.ndarray]:
    """Return an object on its cell: colours premultiplied by alpha (CELL, CELL, 3) and 1 - alpha (CELL, CELL, 1)."""
    scale = _SUPERSAMPLING
    canvas = Image.new("RGBA", (CELL * scale, CELL * scale), (0, 0, 0, 0))
    pen = ImageDraw.Draw(canvas)
    middle, radius = CELL * scale / 2, (9.5 if size == "small" else 13.0) * scale
    fill = COLOURS[colour] + (255,)
    if shape == "circle":
        pen.ellipse((middle - radius, middle - radius, middle + radius, middle + radius), fill=fill)
    else:
        pen.polygon([(middle + x, middle + y) for x, y in _outline(shape, radius)], fill=fill)
    font = ImageFont.load_default(size=15 * scale)
    pen.text((middle, middle), str(digit), font=font, anchor="mm", fill=(255, 255, 255, 255),
             stroke_width=scale, stroke_fill=(0, 0, 0, 255))  # fmt: skip
    pixels = np.asarray(canvas.resize((CELL, CELL), Image.Resampling.BOX), dtype=np.float32)
    alpha = pixels[:, :, 3:] / 255
    return pixels[:, :, :3] * alpha, 1 - alpha


def paint(scene: Scene) -> np.ndarray:
    """Return the image of a scene: uint8 (SIDE, SIDE, 3).

    The background is light grey with a tint and faint noise; objects are moved by up to one pixel.
    """
    rng = np.random.default_rng(scene.seed)
    image = np.empty((SIDE, SIDE, 3), dtype=np.float32)
    image[:] = rng.integers(205, 250) + rng.integers(-6, 7, size=3)
    for thing in scene.things:
        colours, rest = _sprite(thing.shape, thing.colour, thing.size, thing.digit)
        down, right = rng.integers(-1, 2, size=2)
        top, left = (thing.row - 1) * CELL, (thing.column - 1) * CELL
        target = image[top : top + CELL, left : left + CELL]
        target *= np.roll(rest, (down, right), axis=(0, 1))
        target += np.roll(colours, (down, right), axis=(0, 1))
    noise = rng.integers(-6, 7, size=(SIDE, SIDE, 1), dtype=np.int8)
    return np.clip(image + noise, 0, 255).astype(np.uint8)


def render(scene: Scene) -> Image.Image:
    """Return the image of a scene, 128 x 128 RGB."""
    return Image.fromarray(paint(scene))
