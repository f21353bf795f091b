"""Figures of salient weights by different metrics: how far they agree, and how concentrated they are."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import Any

from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure, SubFigure

from bivlm.reports.figures.panels import by_component, colour_of, panels_of
from bivlm.reports.figures.style import (
    BLUE,
    ON_DARK,
    ON_LIGHT,
    PAPER,
    SERIES,
    dots,
    empty,
    finite_values,
    legend_below,
    log_scale,
    new_figure,
    one_line,
    settled,
    styled,
)

_BLUES = LinearSegmentedColormap.from_list("blues", ["#eaf3fa", BLUE])
_OVERLAP = "Overlap: weights that both metrics choose, of those that either does; mean over layers"
_CONCENTRATION = "Concentration: how many of a layer's salient weights stand in the 1 % of columns, or rows, with most"


@styled()
def salient_overlap(records: Sequence[dict[str, Any]]) -> Figure:
    """Draw how far metrics agree on the salient weights (above), and in how few columns and rows these lie (below).

    A record is ``{"name", "component"}`` and `benchmarks.saliency_overlap.compare` of a layer, in model order. A cell
    is the mean Jaccard overlap of two metrics over a component's layers; above the cells is the overlap of independent
    sets of the same size. A dot is the share of a layer's salient weights in the 1 % of columns, or rows, that hold
    most of them. What is None or missing is left out.
    """
    title = "Where the salient weights are, by metric"
    known = [record for record in records if finite_values(record.get("overlap"))]
    if not known:
        return empty(title, "No layer has salient weights by two metrics.")
    figure = new_figure(title, 6.9)
    pairs = dict.fromkeys(pair for record in known for pair in record["overlap"])
    metrics = list(dict.fromkeys(metric for pair in pairs for metric in pair.split("|")))
    looks = dict(zip(metrics, itertools.cycle(SERIES), strict=False))
    (above,), (below,) = figure.subfigures(2, 1, squeeze=False, height_ratios=(1, 1.35))
    _draw_overlaps(above, known, metrics)
    _draw_concentration(below, records, known, looks)
    legend_below(figure, [(look, one_line(metric)) for metric, look in looks.items()])
    return settled(figure)


def _draw_overlaps(figure: SubFigure, known: list[dict[str, Any]], metrics: list[str]) -> None:
    """Draw a triangle of cells for each component: every pair once."""
    figure.suptitle(_OVERLAP, x=0.01, ha="left", fontsize=9)
    groups = by_component(known)
    grid = figure.subplots(1, len(groups), squeeze=False)[0]
    for axes, (component, members) in zip(grid, groups.items(), strict=True):
        axes.set_title(f"{component}, {_layers(members)}{_by_chance(members)}")
        axes.spines["top"].set(visible=True, color=colour_of(component), linewidth=3)
        axes.spines[["left", "bottom"]].set_visible(False)
        axes.grid(False)
        for row, lower in enumerate(metrics[1:]):
            for column, upper in enumerate(metrics[: row + 1]):
                values = _overlaps(members, upper, lower)
                if not values:
                    continue
                mean = fmean(values)
                cell = [column - 0.5, column + 0.5], [row - 0.5, row + 0.5]
                mesh = axes.pcolormesh(*cell, [[mean]], cmap=_BLUES, vmin=0, vmax=1, edgecolors=PAPER, linewidth=1.5)
                mesh.set_label(f"{upper}|{lower}")
                ink = ON_LIGHT if mean < 0.72 else ON_DARK
                axes.text(column, row, f"{mean:.2f}", ha="center", va="center", color=ink)
        places = range(len(metrics) - 1)
        axes.set(xlim=(-0.5, len(metrics) - 1.5), ylim=(len(metrics) - 1.5, -0.6))
        axes.set_xticks(places, metrics[:-1])
        axes.set_yticks(places, metrics[1:] if axes is grid[0] else [""] * len(places))
        axes.tick_params(length=0)


def _draw_concentration(
    figure: SubFigure, records: Sequence[dict[str, Any]], known: list[dict[str, Any]], looks: dict[str, tuple[str, str]]
) -> None:
    """Draw two rows of panels, columns above rows, in percent on a log axis."""
    figure.suptitle(_CONCENTRATION, x=0.01, ha="left", fontsize=9)
    panels = panels_of(figure, records, known, rows=2)
    lowest = 100.0
    for panel in panels:
        for axes, lines in zip(panel.rows, ("columns", "rows"), strict=True):
            for metric, look in looks.items():
                found = {place: finite_values(record.get(lines)).get(metric) for place, record in panel.drawn.items()}
                drawn = [(place, 100 * share) for place, share in found.items() if share is not None]
                lowest = min([lowest, *(share for _, share in drawn)])
                dots(axes, drawn, look, label=f"{lines} {metric}", linewidth=0.5)
    for axes, lines in zip(panels[0].rows, ("columns", "rows"), strict=True):
        axes.set_ylabel(f"{lines}, %" + ("\n(log axis)" if lowest > 0 else ""))
        if lowest > 0:
            axes.set_ylim(lowest / 1.5, 110)
            log_scale(axes)


def _overlaps(members: Iterable[dict[str, Any]], a: str, b: str) -> list[float]:
    """Return the overlap of two metrics for every layer that has it, whichever is named first."""
    values = [finite_values(member["overlap"]) for member in members]
    return [pairs[key] for pairs in values for key in (f"{a}|{b}", f"{b}|{a}") if key in pairs]


def _by_chance(members: Iterable[dict[str, Any]]) -> str:
    """Return the overlap of independent sets of the members' mean share p as text: ``p / (2 - p)``."""
    shares = [share for member in members for share in finite_values(member.get("salient")).values()]
    return f" ({fmean(shares) / (2 - fmean(shares)):.2g} by chance)" if shares else ""


def _layers(members: list[dict[str, Any]]) -> str:
    return f"{len(members)} layers" if len(members) > 1 else "1 layer"
