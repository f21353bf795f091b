"""Place names among many points: beside each point, covering as little as possible."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.text import Annotation
from matplotlib.transforms import Bbox

from bivlm.reports.figures.style import MUTED

_LETTER, _LINE = 0.6, 1.15  # width of a letter and height of a line, in letter sizes
_MARK = 3.5  # half the width of a point's marker, in points
_DIRECTIONS = ((1, 0), (1, 1), (1, -1), (0, 1), (0, -1), (-1, 0), (-1, 1), (-1, -1))
_DISTANCES = (4.5, 9.0, 15.0, 23.0, 33.0)  # from the point to the label, in points; the nearest that is free is taken
_BEGINS_LINE = 12.0  # from here on a line leads to the point


@dataclass(frozen=True)
class Label:
    """`text` for the point (x, y) of the data; `style` is for matplotlib's text."""

    x: float
    y: float
    text: str
    size: float
    style: dict[str, Any]


def place_labels(
    axes: Axes,
    labels: Iterable[Label],
    points: Iterable[tuple[float, float]],
    lines: Iterable[Sequence[tuple[float, float]]] = (),
    reserved: Iterable[Bbox] = (),
) -> list[Annotation]:
    """Write the labels, the first ones in the best places; the layout must be settled.

    Of some forty places around its point a label takes the one that covers least of labels, `points`, `lines` (each a
    path of points) and what is `reserved` (in pixels of the page), then the nearest. Widths are estimated, so that the
    places are the same on any machine.
    """
    scale = 72 / axes.figure.dpi  # everything below is in points
    frame = axes.get_window_extent()
    inside = np.array([frame.x0, frame.y0, frame.x1, frame.y1]) * scale

    def on_page(places: Iterable[tuple[float, float]]) -> np.ndarray:
        return axes.transData.transform(np.array(list(places), dtype=np.float64).reshape(-1, 2)) * scale

    marks = np.concatenate([on_page(points) - _MARK, on_page(points) + _MARK], axis=1)
    strokes = np.concatenate([np.empty((0, 4)), *(_stroke_boxes(on_page(line)) for line in lines)])
    written = np.array([box.extents for box in reserved]).reshape(-1, 4) * scale

    def cost(place: tuple[float, np.ndarray, np.ndarray]) -> float:
        distance, _, box = place
        out = np.maximum(inside[:2] - box[:2], 0).sum() + np.maximum(box[2:] - inside[2:], 0).sum()
        covered = 4 * _covered(box, written) + 2 * _covered(box, marks) + _covered(box, strokes)
        return covered + (1000 * out + 1.5 * distance)

    made = []
    for label in labels:
        (at,) = on_page([(label.x, label.y)])
        half = label.size * np.array([_LETTER * len(label.text), _LINE]) / 2
        _, middle, box = min(_places(at, half), key=cost)
        written = np.concatenate([written, [box]])
        gap = np.maximum(np.maximum(box[:2] - at, at - box[2:]), 0)
        line = {"arrowstyle": "-", "color": MUTED, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 2}
        made.append(
            axes.annotate(
                label.text,
                (label.x, label.y),
                xytext=tuple(middle - at),
                textcoords="offset points",
                fontsize=label.size,
                ha="center",
                va="center",
                arrowprops=line if np.hypot(*gap) > _BEGINS_LINE else None,
                **label.style,
            )
        )
    return made


def _places(at: np.ndarray, half: np.ndarray) -> Iterator[tuple[float, np.ndarray, np.ndarray]]:
    """Yield the places for a label of half the size `half` around `at`: distance, middle and box, the nearest first."""
    for distance in _DISTANCES:
        for across, up in _DIRECTIONS:
            reach = distance if not (across and up) else 0.75 * distance
            middle = at + np.array([across, up]) * (half + reach)
            yield distance, middle, np.concatenate([middle - half, middle + half])


def _stroke_boxes(path: np.ndarray) -> np.ndarray:
    """Return small boxes (.., 4) along a path, one every other point of length."""
    boxes = [path]
    for begin, end in itertools.pairwise(path):
        steps = max(2, int(np.hypot(*(end - begin)) / 2))
        boxes.append(np.linspace(begin, end, steps))
    middles = np.concatenate(boxes)
    return np.concatenate([middles - 0.7, middles + 0.7], axis=1)


def _covered(box: np.ndarray, boxes: np.ndarray) -> float:
    """Return the area that `box` (4,) shares with `boxes` (.., 4), each (left, bottom, right, top)."""
    sides = np.minimum(box[2:], boxes[:, 2:]) - np.maximum(box[:2], boxes[:, :2])
    return float(np.prod(np.maximum(sides, 0), axis=1).sum())
