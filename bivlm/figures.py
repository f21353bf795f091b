"""Every picture of a compression, drawn from its records alone; no checkpoint is read.

`layers` are the records of compression_report.json in model order; a value that is None, missing or not finite leaves
its layer out of the picture, and a picture with nothing left says so in a sentence. Components keep their colour in
every picture. matplotlib's settings belong to the whole process: they are changed under a lock, while a picture is
made or rendered, and put back, so that pictures may be made in several threads and look the same on any machine.
"""

from __future__ import annotations

import io
import itertools
import math
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

import matplotlib
import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MultipleLocator, NullLocator

from bivlm.statistics import HISTOGRAM_EDGES

INK, PAPER, MUTED = "#1b1f24", "#ffffff", "#6e7781"  # a page may swap the first two for its own
# Okabe and Ito's palette, all of it of middling lightness: told apart by most eyes, on white and on black.
BLUE, SKY, GREEN, PINK, ORANGE, RED = "#0072b2", "#56b4e9", "#009e73", "#cc79a7", "#e69f00", "#d55e00"
COMPONENT_COLOURS = {"vision": BLUE, "adaptor": GREEN, "language": RED}
_SERIES = ((ORANGE, "o"), (RED, "s"), (PINK, "^"), (BLUE, "D"), (GREEN, "v"), (SKY, "P"))
_KINDS = {  # colour and marker of what a layer's name ends in
    (BLUE, "o"): ("q_proj", "q"),
    (SKY, "s"): ("k_proj", "k"),
    (GREEN, "^"): ("v_proj", "v"),
    ("#882255", "h"): ("qkv",),
    (PINK, "D"): ("o_proj", "out_proj", "proj"),
    (ORANGE, "v"): ("gate_proj",),
    (RED, "P"): ("up_proj", "fc1"),
    ("#8c6d31", "X"): ("down_proj", "fc2"),
}
_OTHER_KIND = (MUTED, "*")
_BLOCK = re.compile(r"[^.]+\.\d+\.")  # "layers.3."
_WIDTH = 9.0  # inches; on a page of 900 px a 9 pt letter is 12.5 px
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
def _style() -> Iterator[None]:
    with _LOCK, matplotlib.style.context(["default", _STYLE]):
        yield


def svg(figure: Figure) -> str:
    """The figure as an SVG document, the same text every time; letters stay letters.

    Ids are hashes salted with the title, so that several pictures can stand in one page.
    """
    buffer = io.StringIO()
    with _style(), matplotlib.rc_context({"svg.hashsalt": figure.get_suptitle()}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def png(figure: Figure) -> bytes:
    """The figure as a PNG file 1296 pixels wide, the same bytes every time."""
    buffer = io.BytesIO()
    with _style():
        figure.savefig(buffer, format="png", dpi=144, metadata={"Software": None})
    return buffer.getvalue()


@_style()
def weight_histogram(layers: Sequence[dict[str, Any]]) -> Figure:
    """Figures 3 and 4 of the paper: weights and the fitted Gaussian, for each component's layer of median KL.

    Density over ``(w - mean) / std``; below the same on a log axis, where the tails show. Of an even number of layers
    the lower of the two in the middle is drawn. The two open bins have no density; their share is written out.
    """
    title = "Weights and the fitted Gaussian, in each component's layer of median KL"
    known = [layer for layer in _having(layers, "kl_gaussian") if any(layer.get("histogram") or ())]
    if not known:
        return _empty(title, "No layer has a histogram and a KL to the fitted Gaussian.")
    figure, groups = _figure(title, 4.8), _by_component(known)
    grid = figure.subplots(2, len(groups), sharex=True, sharey="row", squeeze=False)
    x, reach, lowest = np.linspace(-8, 8, 513), 4.0, 1.0
    for (component, members), column in zip(groups.items(), grid.T, strict=True):
        layer = sorted(members, key=lambda layer: layer["kl_gaussian"])[(len(members) - 1) // 2]
        counts = np.asarray(layer["histogram"], dtype=np.float64)
        density, outside = counts[1:-1] * 8 / counts.sum(), (counts[0] + counts[-1]) / counts.sum()
        for axes in column:
            axes.stairs(density, HISTOGRAM_EDGES, fill=True, color=_colour(component), alpha=0.55, label="weights")
            axes.plot(x, np.exp(-x * x / 2) / math.sqrt(2 * math.pi), color=INK, linewidth=1.2, label="Gaussian")
        reach = max([reach, *np.abs(HISTOGRAM_EDGES[:-1][density > 0]) + 0.25])
        lowest = min(lowest, 8 / counts.sum() / 2)  # half the height of a single weight
        column[0].set_title(
            f"{component}, {_short(layer['name'])}\nKL {layer['kl_gaussian']:.2g} nats, median of {len(members)}"
        )
        column[1].set_xlabel("(w − mean) / std" + (f"; beyond ±8: {100 * outside:.2g} %" if outside else ""))
    axes = grid[1, 0]
    axes.set_xlim(-min(reach, 8), min(reach, 8))
    axes.xaxis.set_major_locator(MultipleLocator(2))
    axes.set_ylim(max(lowest, 1e-9), 2)
    _log_scale(axes)
    axes.set_ylabel("density, log axis")
    grid[0, 0].set_ylabel("density")
    grid[0, 0].legend(loc="upper left", handlelength=1.2)
    return _settled(figure)


@_style()
def kl_per_layer(layers: Sequence[dict[str, Any]]) -> Figure:
    """Figures 5 and 6 of the paper: KL of each layer's weights to the fitted Gaussian, in nats, by depth and kind."""
    title = "KL to the fitted Gaussian"
    known = _having(layers, "kl_gaussian")
    if not known:
        return _empty(title, "No layer has a KL to the fitted Gaussian.")
    groups = _by_component(known)
    medians = [f"{name} {median(layer['kl_gaussian'] for layer in groups[name]):.2g}" for name in groups]
    figure, legend = _figure(f"{title}, median in nats: {', '.join(medians)}", 3.6), []
    panels = _panels(figure, layers, known)
    for look in (*_KINDS, _OTHER_KIND):
        names = dict.fromkeys(_kind(layer["name"])[1] for layer in known if _kind(layer["name"])[0] == look)
        for panel in panels:
            drawn = [(place, layer) for place, layer in panel.drawn.items() if _kind(layer["name"])[0] == look]
            values = [(place, layer["kl_gaussian"]) for place, layer in drawn]
            _dots(panel.rows[0], values, look, linewidth=0 if look == _OTHER_KIND else 0.7)
        if names:
            legend.append((look, ", ".join(names)))
    axes = panels[0].rows[0]
    axes.set_ylabel("KL, nats")
    if min(layer["kl_gaussian"] for layer in known) > 0:
        _log_scale(axes)
        axes.set_ylabel("KL, nats, log axis")
    _legend(figure, legend)
    return _settled(figure)


@_style()
def error_by_p_max(layers: Sequence[dict[str, Any]]) -> Figure:
    """Figures 7 and 8 of the paper: each layer's relative squared error as p_max lets more weights be salient."""
    title = "Error by p_max, the largest salient share that the search may choose"
    known = [layer for layer in layers if _finite(layer.get("error_by_p_max"))]
    if not known:
        return _empty(title, "No layer has errors at several p_max.")
    shares = sorted({share for layer in known for share in _finite(layer["error_by_p_max"])}, key=float)
    figure, legend = _figure(title, 3.6), []
    panels = _panels(figure, layers, known)
    for share, look in zip(shares, itertools.cycle(_SERIES), strict=False):
        errors = []
        for panel in panels:
            found = {place: _finite(layer["error_by_p_max"]) for place, layer in panel.drawn.items()}
            drawn = [(place, found[place][share]) for place in found if share in found[place]]
            _dots(panel.rows[0], drawn, look, label=f"p_max {share}")
            errors += [error for _, error in drawn]
        legend.append((look, f"p_max {100 * float(share):g} %, median {median(errors):.3f}"))
    panels[0].rows[0].set_ylabel("relative squared error")
    panels[0].rows[0].set_ylim(bottom=0)
    _legend(figure, legend)
    return _settled(figure)


@_style()
def bits_and_error(layers: Sequence[dict[str, Any]]) -> Figure:
    """Stored bits a weight (above) and relative squared error (below) of each layer, in model order."""
    title = "Stored bits and error of each layer"
    known = [layer for layer in _having(layers, "error") if _stored(layer) is not None]
    if not known:
        return _empty(title, "No layer has both stored bits and an error.")
    worst = max(known, key=lambda layer: layer["error"])
    said = f"largest error {worst['error']:.3g} in {worst['component']} {_short(worst['name'])}"
    figure = _figure(f"{title}: {said}", 4.8)
    panels = _panels(figure, layers, known, rows=2)
    for panel in panels:
        look, drawn = (_colour(panel.component), "o"), panel.drawn.items()
        _dots(panel.rows[0], [(place, _stored(layer)) for place, layer in drawn], look, label="stored bits")
        _dots(panel.rows[1], [(place, layer["error"]) for place, layer in drawn], look, label="error")
        sizes = [math.prod(layer["shape"]) for _, layer in drawn]
        mean = np.average([_stored(layer) for _, layer in drawn], weights=sizes)
        panel.rows[0].axhline(float(mean), color=INK, linewidth=0.8, label="mean")
    panels[0].rows[0].set_ylabel("stored bits a weight,\nline: over all weights")
    panels[0].rows[1].set_ylabel("relative squared error")
    return _settled(figure)


@_style()
def accuracy_against_bits(points: Sequence[dict[str, Any]], chance: dict[str, float] | None = None) -> Figure:
    """Accuracy in percent, of every task and their mean, over the stored bits of the compressed linears (log axis).

    The line joins the models that no smaller one beats. A point that lacks one of the tasks has no mean. `chance`, in
    percent by task, is drawn as thin dashed lines. The point of "this_run" has a ring and a bold label.
    """
    title = "Accuracy over stored bits"
    known = [
        point | {"accuracy": accuracy}
        for point in points
        if (_number(point.get("stored_bits")) or 0) > 0 and (accuracy := _finite(point.get("accuracy")))
    ]
    if not known:
        return _empty(title, "No model has both stored bits and an accuracy.")
    known.sort(key=lambda point: point["stored_bits"])
    tasks = list(dict.fromkeys(task for point in points for task in _finite(point.get("accuracy"))))
    levels = {task: level for task, level in _finite(chance).items() if task in tasks}
    for point in known:
        figures = point["accuracy"].values()
        point["mean"] = fmean(figures) if len(figures) == len(tasks) else None
        point["name"] = _plain(point["label"], 26)
        point["name"] += "" if point["mean"] is None else f", {point['mean']:.1f} %"
    chosen = next((point for point in known if point.get("this_run")), known[0])
    said = [f"{point['name']} at {point['stored_bits']:.3g} bits" for point in (chosen, known[-1])]
    longest = max(len(point["name"]) for point in known)
    figure = _figure(f"{title}: {'; '.join(dict.fromkeys(said))}", 4.5 + 0.04 * longest)
    axes = figure.subplots()
    axes.set_xscale("log", base=2)
    axes.set_xlim(min(1, known[0]["stored_bits"]) / 1.1, max(16, known[-1]["stored_bits"]) * 1.1)
    for number, task in enumerate(tasks):
        look = _SERIES[number % len(_SERIES)]
        of_task = [(point["stored_bits"], point["accuracy"][task]) for point in known if task in point["accuracy"]]
        label = f"{task} (chance {levels[task]:.3g})" if task in levels else task
        _dots(axes, of_task, look, label=label, zorder=2.5)
        if task in levels:
            dashes = (6 * number, (6, 6 * max(1, len(tasks) - 1)))  # equal levels lie side by side
            axes.axhline(levels[task], color=look[0], linewidth=0.8, linestyle=dashes, label="_chance")
    means = [(point["stored_bits"], point["mean"]) for point in known if point["mean"] is not None]
    if len(tasks) > 1:
        _dots(axes, means, (INK, "_"), markersize=18, markeredgewidth=2.5, label=f"mean of the {len(tasks)}")
    best = [place for i, place in enumerate(means) if place[1] > max((y for _, y in means[:i]), default=-1)]
    _dots(axes, best, (INK, ""), linewidth=0.8, label="no smaller model is better", zorder=1)
    this_run = [point for point in known if point.get("this_run") and point["mean"] is not None]
    rings = [(point["stored_bits"], point["mean"]) for point in this_run]
    _dots(axes, rings, (INK, "o"), markersize=20, fillstyle="none", markeredgewidth=1.2, label="_this run")
    axes.set_ylim(max(axes.get_ylim()[0], -4), min(axes.get_ylim()[1], 104))
    _plain_ticks(axes.xaxis, LogLocator(base=2))
    axes.set_xlabel("stored bits a weight of the compressed linears, log axis")
    axes.set_ylabel("accuracy, %")
    _label_columns(axes, known)
    figure.legend(loc="outside lower center", ncols=3, handletextpad=0.3)
    return _settled(figure)


def _label_columns(axes: Axes, points: list[dict[str, Any]]) -> None:
    """A thin line up from every point's marks to its label above the axes; labels keep a distance from each other."""
    place = -1.0
    for point in points:
        kl = "" if _number(point.get("kl")) is None else f", KL {point['kl']:.2g}"
        begin = axes.transAxes.inverted().transform(axes.transData.transform((point["stored_bits"], 0)))[0]
        place = max(begin, place + 0.04)
        line = {"color": MUTED, "linewidth": 0.6, "zorder": 0.5}
        axes.axvline(point["stored_bits"], alpha=0.4, label="_column", **line)
        axes.plot([begin, place], [1, 1.03], transform=axes.transAxes, clip_on=False, label="_leader", **line)
        bold = "bold" if point.get("this_run") else "normal"
        turned = {"rotation": 35, "rotation_mode": "anchor", "transform": axes.transAxes}
        axes.text(place, 1.04, point["name"] + kl, fontweight=bold, **turned)


@dataclass(frozen=True)
class _Panel:
    """A component's axes, from top to bottom, and which of its layers are drawn, by their place in the component."""

    component: str
    rows: list[Axes]
    drawn: dict[int, dict[str, Any]]


def _panels(
    figure: Figure, layers: Sequence[dict[str, Any]], known: list[dict[str, Any]], rows: int = 1
) -> list[_Panel]:
    """A column of axes for each component that has a layer in `known`; they share their vertical axes.

    The horizontal axis counts the component's layers in model order, those that are not drawn among them; its ticks
    are the numbers of the blocks, or the names of layers that belong to no block.
    """
    chosen = {id(layer) for layer in known}
    groups = {
        component: members
        for component, members in _by_component(layers).items()
        if any(id(layer) in chosen for layer in members)
    }
    widest = sum(map(len, groups.values()))
    shares = [max(len(members) / widest, 0.12) for members in groups.values()]
    grid = figure.subplots(rows, len(groups), sharex="col", sharey="row", squeeze=False, width_ratios=shares)
    panels = []
    for (component, members), share, column in zip(groups.items(), shares, grid.T, strict=True):
        column[0].spines["top"].set(visible=True, color=_colour(component), linewidth=3)
        column[0].set_xlim(-0.8, len(members) - 0.2)
        column[0].set_title(component)
        _mark_blocks(column[-1], [layer["name"] for layer in members], room=max(1, round(24 * share / sum(shares))))
        drawn = {position: layer for position, layer in enumerate(members) if id(layer) in chosen}
        panels.append(_Panel(component, list(column), drawn))
    return panels


def _mark_blocks(axes: Axes, names: list[str], room: int) -> None:
    """At most about `room` ticks, where blocks begin."""
    begins: dict[str, int] = {}
    for place, name in enumerate(names):
        if match := _BLOCK.search(name):
            begins.setdefault(name[: match.end()], place)
    if begins:
        step = next(step for step in (1, 2, 4, 5, 8, 10, 20, 50, 10**9) if len(begins) / step <= room)
        ticks = {place: prefix.split(".")[-2] for prefix, place in begins.items()}
        ticks = {place: number for place, number in ticks.items() if int(number) % step == 0}
        axes.set_xticks(list(ticks), list(ticks.values()))
        axes.set_xlabel("block")
    else:
        few = [_short(name) for name in names[: 2 * room]]
        axes.set_xticks(range(len(few)), few, rotation=30, ha="right", rotation_mode="anchor")


def _dots(axes: Axes, places: list[tuple[float, float]], look: tuple[str, str], **line: Any) -> None:
    """Markers at `places` (x, y) without a line, smaller where there are many side by side."""
    crowd = axes.get_xlim()[1] if axes.get_xscale() == "linear" else 0
    size = 5 if crowd < 100 else 3.5 if crowd < 250 else 2.5
    defaults = {"color": look[0], "marker": look[1], "markersize": size, "markeredgewidth": 0, "linewidth": 0}
    if places:
        axes.plot(*zip(*places, strict=True), **{**defaults, **line})


def _legend(figure: Figure, entries: list[tuple[tuple[str, str], str]]) -> None:
    handles = [
        Line2D([], [], color=colour, marker=marker, linewidth=0, label=text) for (colour, marker), text in entries
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=9, handletextpad=0.1, columnspacing=1.2)


def _log_scale(axes: Axes) -> None:
    """A vertical log axis for what is drawn already, its ticks as plain numbers."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    _plain_ticks(axes.yaxis, LogLocator(subs=(1, 2, 5) if high / low < 300 else (1,)))


def _plain_ticks(axis: Axis, locator: LogLocator) -> None:
    axis.set_major_locator(locator)
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def _figure(title: str, height: float) -> Figure:
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    figure.suptitle(title, x=0.01, ha="left")
    return figure


def _empty(title: str, reason: str) -> Figure:
    figure = _figure(title, 1.6)
    axes = figure.subplots()
    axes.set(xticks=[], yticks=[])
    axes.text(0.5, 0.5, reason, ha="center", va="center", transform=axes.transAxes)
    return _settled(figure)


def _settled(figure: Figure) -> Figure:
    """The figure with its layout computed once: computed at every rendering it would move a little each time."""
    figure.get_layout_engine().execute(figure)
    figure.set_layout_engine("none")
    return figure


def _by_component(layers: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    groups: dict[str, list[dict[str, Any]]] = {}
    for layer in layers:
        groups.setdefault(layer["component"], []).append(layer)
    return groups


def _having(layers: Sequence[dict[str, Any]], key: str) -> list[dict[str, Any]]:
    return [layer for layer in layers if _number(layer.get(key)) is not None]


def _colour(component: str) -> str:
    return COMPONENT_COLOURS.get(component, MUTED)


def _kind(name: str) -> tuple[tuple[str, str], str]:
    """(colour, marker) of the kind of projection that the layer's name ends in, and its name."""
    last = name.rsplit(".", 1)[-1]
    return next(((look, last) for look, names in _KINDS.items() if last in names), (_OTHER_KIND, "others"))


def _number(value: Any) -> float | None:
    """The value if it is a finite number."""
    return value if isinstance(value, (int, float)) and math.isfinite(value) else None


def _finite(figures: dict[str, Any] | None) -> dict[str, float]:
    return {key: value for key, value in (figures or {}).items() if _number(value) is not None}


def _stored(layer: dict[str, Any]) -> float | None:
    return _number((layer.get("bits") or {}).get("stored"))


def _short(name: str) -> str:
    """The layer's name from its numbered block on, else its last part that says something ("mlp.0", not "0")."""
    match, parts = _BLOCK.search(name), name.split(".")
    short = name[match.start() :] if match else ".".join(parts[-2:] if parts[-1].isdigit() else parts[-1:])
    return _plain(short)


def _plain(text: str, longest: int = 40) -> str:
    """On one line and not too long."""
    text = " ".join(str(text).split())
    return text if len(text) <= longest else f"{text[: longest // 2]}…{text[-(longest // 2 - 1) :]}"
