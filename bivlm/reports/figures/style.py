"""The look of every figure: colours, the page's letters, axes; and the writing of a figure to a file.

matplotlib's settings belong to the whole process: they are changed under a lock, while a figure is made or rendered,
and put back, so that figures may be made in several threads and look the same on any machine.
"""

from __future__ import annotations

import io
import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

INK, PAPER, MUTED = "#1b1f24", "#ffffff", "#6e7781"  # a page may swap the first two for its own
ON_LIGHT, ON_DARK = "#101418", "#fcfdfe"  # letters on a colour keep theirs
# Okabe and Ito's palette, all of it of middling lightness: distinguished by most eyes, on white and on black.
BLUE, SKY, GREEN, PINK, ORANGE, RED = "#0072b2", "#56b4e9", "#009e73", "#cc79a7", "#e69f00", "#d55e00"
COMPONENT_COLOURS = {"vision": BLUE, "adaptor": GREEN, "language": RED}
SERIES = ((ORANGE, "o"), (RED, "s"), (PINK, "^"), (BLUE, "D"), (GREEN, "v"), (SKY, "P"))
WIDTH = 9.0  # inches; on a page of 900 px a 9 pt letter is 12.5 px
_STYLE = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), INK),
    **dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color", "grid.color"), MUTED),
    **dict.fromkeys(("figure.facecolor", "axes.facecolor"), PAPER),
    **dict.fromkeys(("axes.spines.right", "axes.spines.top", "legend.frameon"), False),
    "font.size": 9,
    "axes.titlesize": 9,
    "figure.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.ymargin": 0.1,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
    "svg.fonttype": "none",
}
_LOCK = threading.RLock()


@contextmanager
def styled() -> Iterator[None]:
    """Apply the settings of every figure, for a ``with`` or as a decorator of the function that draws."""
    with _LOCK, matplotlib.style.context(["default", _STYLE]):
        yield


def svg(figure: Figure) -> str:
    """Return the figure as an SVG document, the same text every time; letters stay letters.

    Ids are hashes salted with the title, so that several figures can share one page.
    """
    buffer = io.StringIO()
    with styled(), matplotlib.rc_context({"svg.hashsalt": figure.get_suptitle()}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def png(figure: Figure) -> bytes:
    """Return the figure as a PNG file 1296 pixels wide, the same bytes every time."""
    buffer = io.BytesIO()
    with styled():
        figure.savefig(buffer, format="png", dpi=144, metadata={"Software": None})
    return buffer.getvalue()


def new_figure(title: str, height: float) -> Figure:
    """Return an empty figure, `height` in inches, that will lay itself out."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    figure.suptitle(title, x=0.01, ha="left")
    return figure


def empty(title: str, reason: str) -> Figure:
    """Return a figure without data: a sentence that says why."""
    figure = new_figure(title, 1.6)
    axes = figure.subplots()
    axes.set(xticks=[], yticks=[])
    axes.text(0.5, 0.5, reason, ha="center", va="center", transform=axes.transAxes)
    return settled(figure)


def settled(figure: Figure) -> Figure:
    """Return the figure with its layout computed once: computed at every rendering it would move a little each time."""
    if engine := figure.get_layout_engine():
        engine.execute(figure)
    figure.set_layout_engine("none")
    return figure


def dots(axes: Axes, places: Sequence[tuple[float, float]], look: tuple[str, str], **line: Any) -> None:
    """Draw markers at `places` (x, y) without a line, smaller where there are many side by side."""
    crowd = axes.get_xlim()[1] if axes.get_xscale() == "linear" else 0
    size = 5 if crowd < 100 else 3.5 if crowd < 250 else 2.5
    defaults = {"color": look[0], "marker": look[1], "markersize": size, "markeredgewidth": 0, "linewidth": 0}
    if places:
        axes.plot(*zip(*places, strict=True), **{**defaults, **line})


def legend_below(figure: Figure, entries: list[tuple[tuple[str, str], str]]) -> None:
    """Add a legend of ((colour, marker), text) below all panels."""
    handles = [
        Line2D([], [], color=colour, marker=marker, linewidth=0, label=text) for (colour, marker), text in entries
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=9, handletextpad=0.1, columnspacing=1.2)


def log_scale(axes: Axes) -> None:
    """Make the vertical axis logarithmic for what is drawn already, its ticks as plain numbers."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    plain_ticks(axes.yaxis, LogLocator(subs=(1, 2, 5) if high / low < 300 else (1,)))


def plain_ticks(axis: Axis, locator: LogLocator) -> None:
    """Set ticks where the locator says, as plain numbers, and none between."""
    axis.set_major_locator(locator)
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def finite_number(value: Any) -> float | None:
    """Return the value if it is a finite number, else None."""
    return value if isinstance(value, (int, float)) and math.isfinite(value) else None


def finite_values(figures: dict[str, Any] | None) -> dict[str, float]:
    """Return the entries whose value is a finite number."""
    return {key: value for key, value in (figures or {}).items() if finite_number(value) is not None}


def one_line(text: str, longest: int = 40) -> str:
    """Return the text on one line, of at most `longest` characters."""
    text = " ".join(str(text).split())
    return text if len(text) <= longest else f"{text[: longest // 2]}…{text[-(longest // 2 - 1) :]}"
