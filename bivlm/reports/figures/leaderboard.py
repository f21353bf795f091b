"""The leaderboard as a figure: the loss at the stored bits, and how few bits were claimed."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from bivlm.reports.figures.labels import Label, place_labels
from bivlm.reports.figures.style import (
    BLUE,
    GREEN,
    INK,
    MUTED,
    ORANGE,
    PAPER,
    PINK,
    RED,
    empty,
    log_scale,
    new_figure,
    one_line,
    settled,
    styled,
)
from bivlm.reports.leaderboard.entries import Loss, shannon_bound

# A family of methods has one colour, each method a marker; names are compared by their letters, from the beginning.
_LOOKS = {
    "bivlm": (RED, "o"),
    "trellis": (PINK, "p"),
    "rtn": (BLUE, "s"),
    "gptq": (BLUE, "D"),
    "awq": (BLUE, "P"),
    "qvlm": (BLUE, "X"),
    "pbllm": (GREEN, "^"),
    "billm": (GREEN, "v"),
    "arb": (GREEN, "<"),
    "hb": (GREEN, ">"),
}
_MIXED, _OTHER = (ORANGE, "h"), (MUTED, "d")
_SIZE = 6.5
_PANELS: tuple[tuple[Loss, str, Callable[[Mapping[str, Any]], float]], ...] = (
    ("accuracy", "mean accuracy, %", lambda entry: entry["mean_accuracy"]["accuracy"]),
    ("kl", "KL to full precision, nats per token", lambda entry: entry["kl"]),
    ("relative_error", "relative squared error", lambda entry: entry["relative_error"]),
)


@styled()
def quality_against_bits(board: Mapping[str, Any]) -> Figure:
    """Draw mean accuracy, KL and relative error of every entry of a board over stored bits.

    Numbers are those of the board's table (`bivlm.reports.leaderboard.ranking.board`). Members of a panel's Pareto
    front are named, and a line joins them. A small hollow mark is at the bits that the method claims. Recipes that
    failed are not drawn. Full precision is a level, not a point: at 16 bits it would push all others together.
    """
    title = f"Leaderboard of {one_line(board['model'].get('name') or board['model'].get('id') or 'the model')}"
    entries = board["entries"]
    if not entries:
        return empty(title, "No recipe could be measured.")
    recipes = "1 recipe" if len(entries) == 1 else f"{len(entries)} recipes"
    figure = new_figure(f"{title}: {recipes}, {sum(board['questions'].values()):,} questions", 12)
    panels = figure.subplots(len(_PANELS), 1, sharex=True, height_ratios=(1.4, 1, 1))
    claimed = [entry["bits"]["nominal"] for entry in entries]
    stored = [entry["bits"]["stored"] for entry in entries]
    low, high = min(claimed + stored), max(claimed + stored)
    margin = 0.04 * max(high - low, 1)
    panels[0].set_xlim(low - margin, high + 2.5 * margin)
    for axes, (_, name, value) in zip(panels, _PANELS, strict=True):
        _draw_entries(axes, entries, value)
        axes.set_ylabel(name)
        axes.xaxis.set_tick_params(labelbottom=True)
    accuracy, divergence, error = panels
    divergence.set_title(one_line(f"KL on {board['measured_on']}", 100), loc="left", fontsize=8)
    _draw_intervals(accuracy, entries)
    _draw_reference_lines(accuracy, board)
    _draw_shannon(error)
    for axes in (divergence, error):
        if all(line.get_ydata().min() > 0 for line in axes.lines):
            log_scale(axes)
            axes.set_ylabel(f"{axes.get_ylabel()}, log axis")
    error.set_xlabel("bits per weight of the packed linears")
    fronts = [_draw_front(axes, board, loss, value) for axes, (loss, _, value) in zip(panels, _PANELS, strict=True)]
    figure.legend(handles=_legend(entries), loc="outside lower center", ncols=6, handletextpad=0.4, columnspacing=1.4)
    settled(figure)
    for axes, front, (_, _, value) in zip(panels, fronts, _PANELS, strict=True):
        _write_names(axes, entries, front, value)
    return figure


def _draw_entries(axes: Axes, entries: Sequence[Mapping[str, Any]], value: Callable[[Any], float]) -> None:
    for entry in entries:
        colour, marker = _look(entry["method"])
        y, stored, nominal = value(entry), entry["bits"]["stored"], entry["bits"]["nominal"]
        axes.plot([nominal, stored], [y, y], color=colour, linewidth=0.6, alpha=0.3, zorder=1, label="_gap")
        claim: dict[str, Any] = {"marker": marker, "markersize": 3.5, "fillstyle": "none", "markeredgewidth": 0.7}
        axes.plot([nominal], [y], color=colour, linewidth=0, zorder=1.2, alpha=0.45, label="_claimed", **claim)
        axes.plot([stored], [y], zorder=3, label=entry["recipe"], **_mark(colour, marker, entry["finish"]))


def _mark(colour: str, marker: str, finish: bool) -> dict[str, Any]:
    """Return the look of a mark: filled for finished entries, else open."""
    look = {"color": colour, "marker": marker, "markersize": _SIZE, "linewidth": 0, "markeredgewidth": 1.1}
    return look | {"markeredgecolor": colour, "markerfacecolor": colour if finish else PAPER}


def _draw_intervals(axes: Axes, entries: Sequence[Mapping[str, Any]]) -> None:
    for entry in entries:
        x, (low, high) = entry["bits"]["stored"], entry["mean_accuracy"]["ci95"]
        colour, _ = _look(entry["method"])
        axes.plot([x, x], [low, high], color=colour, linewidth=0.9, alpha=0.55, zorder=2, label="_interval")


def _draw_reference_lines(axes: Axes, board: Mapping[str, Any]) -> None:
    full, chance = board["full_precision"], board["chance"]["mean"]
    mean = full["mean_accuracy"]["accuracy"]
    lines = [(mean, f"full precision, {full['bits']:.3g} bits: {mean:.1f} %", "bottom", 3)]
    lines += [] if chance is None else [(chance, f"chance: {chance:.1f} %", "top", -3)]
    for level, text, edge, up in lines:
        axes.axhline(level, color=INK, linewidth=0.8, linestyle=(0, (6, 4)), zorder=0.5, label="_reference")
        corner = ("axes fraction", "data")
        axes.annotate(text, (0, level), (4, up), corner, "offset points", va=edge, fontsize=8)


def _draw_shannon(axes: Axes) -> None:
    bits = np.linspace(*axes.get_xlim(), 65)
    least = [shannon_bound(x) for x in bits]
    axes.plot(bits, least, color=INK, linewidth=1, linestyle=":", zorder=0.8, label="_Shannon")


def _draw_front(
    axes: Axes, board: Mapping[str, Any], loss: Loss, value: Callable[[Any], float]
) -> list[Mapping[str, Any]]:
    """Draw the line through the Pareto front; return its members."""
    front = [entry for entry in board["entries"] if entry["recipe"] in board["pareto"][loss]]
    places = [(entry["bits"]["stored"], value(entry)) for entry in front]
    if places:
        axes.plot(*zip(*places, strict=True), color=INK, linewidth=0.9, zorder=1.5, label="_front")
    return front


def _write_names(
    axes: Axes, entries: Sequence[Mapping[str, Any]], front: Sequence[Mapping[str, Any]], value: Callable[[Any], float]
) -> None:
    def label(entry: Mapping[str, Any], text: str, size: float, colour: str) -> Label:
        return Label(entry["bits"]["stored"], value(entry), text, size, {"color": colour, "zorder": 4})

    names = [label(entry, f"{entry['number']} {one_line(entry['recipe'], 28)}", 7.5, INK) for entry in front]
    others = [entry for entry in entries if entry not in front]
    numbers = [label(entry, str(entry["number"]), 6.5, MUTED) for entry in others]
    points = [(entry["bits"]["stored"], value(entry)) for entry in entries]
    lines = [
        [(x, y) for x, y in np.asarray(line.get_xydata())]
        for line in axes.lines
        if line.get_label() in ("_front", "_Shannon", "_interval")
    ]
    lines += [[(entry["bits"]["nominal"], value(entry))] for entry in entries]
    written = [text.get_window_extent() for text in axes.texts]
    place_labels(axes, [*names, *numbers], points, lines, written)


def _legend(entries: Sequence[Mapping[str, Any]]) -> list[Line2D]:
    methods: dict[tuple[str, str], list[str]] = {}
    for entry in entries:
        methods.setdefault(_look(entry["method"]), []).append(entry["method"])
    ranks = {look: rank for rank, look in enumerate([*_LOOKS.values(), _MIXED, _OTHER])}
    handles = [
        Line2D([], [], label=", ".join(dict.fromkeys(methods[look])), **_mark(*look, finish=True))
        for look in sorted(methods, key=ranks.__getitem__)
    ]
    plain: dict[str, Any] = {"color": MUTED, "marker": "o", "linewidth": 0}
    return [
        *handles,
        Line2D([], [], label="as packed", **_mark(MUTED, "o", finish=False)),
        Line2D([], [], label="finished", **_mark(MUTED, "o", finish=True)),
        Line2D([], [], label="bits as claimed", markersize=3.5, fillstyle="none", alpha=0.6, **plain),
        Line2D([], [], label="Pareto front", color=INK, linewidth=0.9),
        Line2D([], [], label="Shannon, 2^(−2 bits)", color=INK, linewidth=1, linestyle=":"),
    ]


def _look(method: str) -> tuple[str, str]:
    """Return the colour of a method's family and the marker of the method in it."""
    if "+" in method:
        return _MIXED
    letters = re.sub(r"[^a-z0-9]", "", method.lower())
    return next((look for name, look in _LOOKS.items() if letters.startswith(name)), _OTHER)
