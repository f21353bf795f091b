"""Figures of what one compression did to its layers, and where it stands among others."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MultipleLocator

from bivlm.numerics.weight_statistics import HISTOGRAM_EDGES
from bivlm.reports.figures.panels import by_component, colour_of, having, panels_of, short_name
from bivlm.reports.figures.style import (
    BLUE,
    GREEN,
    INK,
    MUTED,
    ORANGE,
    PINK,
    RED,
    SERIES,
    SKY,
    dots,
    empty,
    finite_number,
    finite_values,
    legend_below,
    log_scale,
    new_figure,
    one_line,
    plain_ticks,
    settled,
    styled,
)

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


@styled()
def weight_histogram(layers: Sequence[dict[str, Any]]) -> Figure:
    """Draw weights and the fitted Gaussian, for each component's layer of median KL (figures 3 and 4 of the paper).

    Density over ``(w - mean) / std``; below the same on a log axis, where the tails show. Of an even number of layers
    the lower of the two in the middle is drawn. The two open bins have no density; their share is written out.
    """
    title = "Weights and the fitted Gaussian, in each component's layer of median KL"
    known = [layer for layer in having(layers, "kl_gaussian") if any(layer.get("histogram") or ())]
    if not known:
        return empty(title, "No layer has a histogram and a KL to the fitted Gaussian.")
    figure, groups = new_figure(title, 4.8), by_component(known)
    grid = figure.subplots(2, len(groups), sharex=True, sharey="row", squeeze=False)
    x, reach, lowest = np.linspace(-8, 8, 513), 4.0, 1.0
    for (component, members), column in zip(groups.items(), grid.T, strict=True):
        layer = sorted(members, key=lambda layer: layer["kl_gaussian"])[(len(members) - 1) // 2]
        counts = np.asarray(layer["histogram"], dtype=np.float64)
        density, outside = counts[1:-1] * 8 / counts.sum(), (counts[0] + counts[-1]) / counts.sum()
        for axes in column:
            axes.stairs(density, HISTOGRAM_EDGES, fill=True, color=colour_of(component), alpha=0.55, label="weights")
            axes.plot(x, np.exp(-x * x / 2) / math.sqrt(2 * math.pi), color=INK, linewidth=1.2, label="Gaussian")
        reach = max([reach, *np.abs(HISTOGRAM_EDGES[:-1][density > 0]) + 0.25])
        lowest = min(lowest, 8 / counts.sum() / 2)  # half the height of a single weight
        column[0].set_title(
            f"{component}, {short_name(layer['name'])}\nKL {layer['kl_gaussian']:.2g} nats, median of {len(members)}"
        )
        column[1].set_xlabel("(w − mean) / std" + (f"; beyond ±8: {100 * outside:.2g} %" if outside else ""))
    axes = grid[1, 0]
    axes.set_xlim(-min(reach, 8), min(reach, 8))
    axes.xaxis.set_major_locator(MultipleLocator(2))
    axes.set_ylim(max(lowest, 1e-9), 2)
    log_scale(axes)
    axes.set_ylabel("density, log axis")
    grid[0, 0].set_ylabel("density")
    grid[0, 0].legend(loc="upper left", handlelength=1.2)
    return settled(figure)


@styled()
def kl_per_layer(layers: Sequence[dict[str, Any]]) -> Figure:
    """Draw each layer's KL to the fitted Gaussian, in nats, by depth and kind (figures 5 and 6 of the paper)."""
    title = "KL to the fitted Gaussian"
    known = having(layers, "kl_gaussian")
    if not known:
        return empty(title, "No layer has a KL to the fitted Gaussian.")
    groups = by_component(known)
    medians = [f"{name} {median(layer['kl_gaussian'] for layer in groups[name]):.2g}" for name in groups]
    figure, legend = new_figure(f"{title}, median in nats: {', '.join(medians)}", 3.6), []
    panels = panels_of(figure, layers, known)
    for look in (*_KINDS, _OTHER_KIND):
        names = dict.fromkeys(_kind(layer["name"])[1] for layer in known if _kind(layer["name"])[0] == look)
        for panel in panels:
            drawn = [(place, layer) for place, layer in panel.drawn.items() if _kind(layer["name"])[0] == look]
            values = [(place, layer["kl_gaussian"]) for place, layer in drawn]
            dots(panel.rows[0], values, look, linewidth=0 if look == _OTHER_KIND else 0.7)
        if names:
            legend.append((look, ", ".join(names)))
    axes = panels[0].rows[0]
    axes.set_ylabel("KL, nats")
    if min(layer["kl_gaussian"] for layer in known) > 0:
        log_scale(axes)
        axes.set_ylabel("KL, nats, log axis")
    legend_below(figure, legend)
    return settled(figure)


@styled()
def error_by_p_max(layers: Sequence[dict[str, Any]]) -> Figure:
    """Draw each layer's relative squared error as p_max allows more salient weights (figures 7 and 8 of the paper)."""
    title = "Error by p_max, the largest salient share that the search may choose"
    known = [layer for layer in layers if finite_values(layer.get("error_by_p_max"))]
    if not known:
        return empty(title, "No layer has errors at several p_max.")
    shares = sorted({share for layer in known for share in finite_values(layer["error_by_p_max"])}, key=float)
    figure, legend = new_figure(title, 3.6), []
    panels = panels_of(figure, layers, known)
    for share, look in zip(shares, itertools.cycle(SERIES), strict=False):
        errors = []
        for panel in panels:
            found = {place: finite_values(layer["error_by_p_max"]) for place, layer in panel.drawn.items()}
            drawn = [(place, found[place][share]) for place in found if share in found[place]]
            dots(panel.rows[0], drawn, look, label=f"p_max {share}")
            errors += [error for _, error in drawn]
        legend.append((look, f"p_max {100 * float(share):g} %, median {median(errors):.3f}"))
    panels[0].rows[0].set_ylabel("relative squared error")
    panels[0].rows[0].set_ylim(bottom=0)
    legend_below(figure, legend)
    return settled(figure)


@styled()
def bits_and_error(layers: Sequence[dict[str, Any]]) -> Figure:
    """Draw stored bits per weight (above) and relative squared error (below) of each layer, in model order."""
    title = "Stored bits and error of each layer"
    known = [layer for layer in having(layers, "error") if _stored(layer) is not None]
    if not known:
        return empty(title, "No layer has both stored bits and an error.")
    worst = max(known, key=lambda layer: layer["error"])
    said = f"largest error {worst['error']:.3g} in {worst['component']} {short_name(worst['name'])}"
    figure = new_figure(f"{title}: {said}", 4.8)
    panels = panels_of(figure, layers, known, rows=2)
    for panel in panels:
        look, drawn = (colour_of(panel.component), "o"), panel.drawn.items()
        stored = [(place, bits) for place, layer in drawn if (bits := _stored(layer)) is not None]
        dots(panel.rows[0], stored, look, label="stored bits")
        dots(panel.rows[1], [(place, layer["error"]) for place, layer in drawn], look, label="error")
        sizes = [math.prod(layer["shape"]) for _, layer in drawn]
        mean = np.average([bits for _, bits in stored], weights=sizes)
        panel.rows[0].axhline(float(mean), color=INK, linewidth=0.8, label="mean")
    panels[0].rows[0].set_ylabel("stored bits per weight,\nline: over all weights")
    panels[0].rows[1].set_ylabel("relative squared error")
    return settled(figure)


@dataclass(frozen=True)
class _Point:
    """A model at its stored bits per weight, with what is known of its accuracy in percent."""

    label: str
    bits: float
    accuracy: dict[str, float]
    mean: float | None
    this_run: bool
    kl: float | None

    @property
    def name(self) -> str:
        return one_line(self.label, 26) + ("" if self.mean is None else f", {self.mean:.1f} %")


@styled()
def accuracy_against_bits(
    points: Sequence[dict[str, Any]], chance: dict[str, float] | None = None, measured_on: str | None = None
) -> Figure:
    """Draw accuracy in percent, of every task and their mean, over stored bits of the compressed linears (log axis).

    The line joins the models that no smaller one beats. A point that lacks one of the tasks has no mean. `chance`, in
    percent by task, is drawn as thin dashed lines. The point of "this_run" has a ring and a bold label. `measured_on`
    names the samples that the KL in the labels is measured on.
    """
    title = "Accuracy over stored bits"
    tasks = list(dict.fromkeys(task for point in points for task in finite_values(point.get("accuracy"))))
    known = _known_points(points, tasks)
    if not known:
        return empty(title, "No model has both stored bits and an accuracy.")
    chosen = next((point for point in known if point.this_run), known[0])
    said = [f"{point.name} at {point.bits:.3g} bits" for point in (chosen, known[-1])]
    longest = max(len(point.name) for point in known)
    figure = new_figure(f"{title}: {'; '.join(dict.fromkeys(said))}", 4.5 + 0.04 * longest)
    axes = figure.subplots()
    axes.set_xscale("log", base=2)
    axes.set_xlim(min(1, known[0].bits) / 1.1, max(16, known[-1].bits) * 1.1)
    _draw_tasks(axes, known, tasks, finite_values(chance))
    _draw_means(axes, known, len(tasks))
    axes.set_ylim(max(axes.get_ylim()[0], -4), min(axes.get_ylim()[1], 104))
    plain_ticks(axes.xaxis, LogLocator(base=2))
    on = f"\nKL in nats per token, on {one_line(measured_on, 90)}" if measured_on else ""
    axes.set_xlabel(f"stored bits per weight of the compressed linears, log axis{on}")
    axes.set_ylabel("accuracy, %")
    _label_columns(axes, known)
    figure.legend(loc="outside lower center", ncols=3, handletextpad=0.3)
    return settled(figure)


def _known_points(points: Sequence[dict[str, Any]], tasks: list[str]) -> list[_Point]:
    """Return the points with stored bits and an accuracy, by rising bits."""
    known = []
    for point in points:
        bits, accuracy = finite_number(point.get("stored_bits")), finite_values(point.get("accuracy"))
        if bits and bits > 0 and accuracy:
            mean = fmean(accuracy.values()) if len(accuracy) == len(tasks) else None
            this_run, kl = bool(point.get("this_run")), finite_number(point.get("kl"))
            known.append(_Point(point["label"], bits, accuracy, mean, this_run, kl))
    return sorted(known, key=lambda point: point.bits)


def _draw_tasks(axes: Axes, points: list[_Point], tasks: list[str], levels: dict[str, float]) -> None:
    for number, task in enumerate(tasks):
        look = SERIES[number % len(SERIES)]
        of_task = [(point.bits, point.accuracy[task]) for point in points if task in point.accuracy]
        label = f"{task} (chance {levels[task]:.3g})" if task in levels else task
        dots(axes, of_task, look, label=label, zorder=2.5)
        if task in levels:
            dashes = (6 * number, (6, 6 * max(1, len(tasks) - 1)))  # equal levels lie side by side
            axes.axhline(levels[task], color=look[0], linewidth=0.8, linestyle=dashes, label="_chance")


def _draw_means(axes: Axes, points: list[_Point], tasks: int) -> None:
    means = [(point.bits, point.mean) for point in points if point.mean is not None]
    if tasks > 1:
        dots(axes, means, (INK, "_"), markersize=18, markeredgewidth=2.5, label=f"mean of the {tasks}")
    best = [place for i, place in enumerate(means) if place[1] > max((y for _, y in means[:i]), default=-1)]
    dots(axes, best, (INK, ""), linewidth=0.8, label="no smaller model is better", zorder=1)
    rings = [(point.bits, point.mean) for point in points if point.this_run and point.mean is not None]
    dots(axes, rings, (INK, "o"), markersize=20, fillstyle="none", markeredgewidth=1.2, label="_this run")


def _label_columns(axes: Axes, points: list[_Point]) -> None:
    """Draw a thin line up from every point's marks to its label above the axes; labels keep a distance."""
    place = -1.0
    for point in points:
        begin = axes.transAxes.inverted().transform(axes.transData.transform((point.bits, 0)))[0]
        place = max(begin, place + 0.04)
        line: dict[str, Any] = {"color": MUTED, "linewidth": 0.6, "zorder": 0.5}
        axes.axvline(point.bits, alpha=0.4, label="_column", **line)
        axes.plot([begin, place], [1, 1.03], transform=axes.transAxes, clip_on=False, label="_leader", **line)
        text = point.name if point.kl is None else f"{point.name}, KL {point.kl:.2g}"
        turned: dict[str, Any] = {"rotation": 35, "rotation_mode": "anchor", "transform": axes.transAxes}
        axes.text(place, 1.04, text, fontweight="bold" if point.this_run else "normal", **turned)


def _kind(name: str) -> tuple[tuple[str, str], str]:
    """Return (colour, marker) of the kind of projection that the layer's name ends in, and its name."""
    last = name.rsplit(".", 1)[-1]
    return next(((look, last) for look, names in _KINDS.items() if last in names), (_OTHER_KIND, "others"))


def _stored(layer: dict[str, Any]) -> float | None:
    return finite_number((layer.get("bits") or {}).get("stored"))
