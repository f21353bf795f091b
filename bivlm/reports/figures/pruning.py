"""Figures of the loss when image tokens are dropped: by layer and share, and by share as in the paper's figure 2."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure

from bivlm.reports.figures.style import INK, ON_DARK, ON_LIGHT, SERIES, empty, new_figure, one_line, settled, styled
from bivlm.reports.pruning_tables import grid

_TITLE = "Accuracy lost by dropping tokens, percentage points (*: the 95 % interval leaves out zero)"


@styled()
def loss_maps(table: pd.DataFrame) -> Figure:
    """Draw a map per model and place: the loss in every cell, and a star where its interval excludes zero.

    `table` is of `bivlm.reports.pruning_tables.as_table`; of several benchmarks all together are drawn, of several
    scores the first.
    """
    table = _drawn(table)
    if table["loss"].dropna().empty:
        return empty(_TITLE, "No cell of the sweep could be measured.")
    models, places = (list(dict.fromkeys(table[key])) for key in ("model", "place"))
    layers = max(table.groupby("place")["layer"].nunique().max(), 1)
    figure = new_figure(_TITLE, len(models) * (0.9 + 0.32 * layers) + 0.6)
    panels = figure.subplots(len(models), len(places), squeeze=False)
    largest = max(5.0, float(table["loss"].max()))
    norm = TwoSlopeNorm(0.0, vmin=-largest, vmax=largest)
    for row, model in zip(panels, models, strict=True):
        for axes, place in zip(row, places, strict=True):
            _draw_map(axes, table[(table["model"] == model) & (table["place"] == place)], norm)
            axes.set_title(f"{one_line(model, 30)}, {place}")
            axes.set_xlabel("share dropped")
        row[0].set_ylabel("from layer")
    return settled(figure)


def _draw_map(axes: Axes, cells: pd.DataFrame, norm: TwoSlopeNorm) -> None:
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    if cells.empty:
        axes.set(xticks=[], yticks=[])
        return
    keys = cells["model"].iloc[0], cells["task"].iloc[0], cells["place"].iloc[0], cells["score"].iloc[0]
    losses = grid(cells, *keys, value="loss").astype(float)
    low, high = (grid(cells, *keys, value=value).astype(float).to_numpy() for value in ("loss_low", "loss_high"))
    values = losses.to_numpy()
    axes.pcolormesh(np.ma.masked_invalid(values), cmap="RdBu_r", norm=norm, edgecolors="#ffffff", linewidth=1)
    for (row, column), value in np.ndenumerate(values):
        sure = not low[row, column] <= 0 <= high[row, column]
        text = "–" if np.isnan(value) else f"{value:.1f}{'*' if sure else ''}"
        ink = ON_DARK if abs(norm(value) - 0.5) > 0.38 else ON_LIGHT
        axes.text(column + 0.5, row + 0.5, text, ha="center", va="center", color=ink, fontsize=7.5)
    axes.set_xticks(np.arange(values.shape[1]) + 0.5, losses.columns, fontsize=7.5)
    axes.set_yticks(np.arange(values.shape[0]) + 0.5, losses.index, fontsize=7.5)
    axes.invert_yaxis()


@styled()
def accuracy_by_share(table: pd.DataFrame, baselines: Mapping[str, Mapping[str, float]]) -> Figure:
    """Draw accuracy over the dropped share: one panel per model and place, one line per layer with its 95 % interval.

    `baselines` are accuracies without pruning, by model and benchmark: a level.
    """
    title = "Accuracy over the share of tokens dropped"
    table = _drawn(table)
    if table["accuracy"].dropna().empty:
        return empty(title, "No cell of the sweep could be measured.")
    models, places = (list(dict.fromkeys(table[key])) for key in ("model", "place"))
    figure = new_figure(title, 0.9 + 2.3 * len(models))
    panels = figure.subplots(len(models), len(places), squeeze=False, sharey=True, sharex=True)
    layers = sorted(table["layer"].dropna().unique())
    looks = dict(zip(layers, SERIES * (1 + len(layers) // len(SERIES)), strict=False))
    for row, model in zip(panels, models, strict=True):
        for axes, place in zip(row, places, strict=True):
            cells = table[(table["model"] == model) & (table["place"] == place)]
            for layer, line in cells.groupby("layer", dropna=False):
                colour, marker = looks.get(layer, (INK, "o"))
                label = "" if pd.isna(layer) else f"from layer {layer}"
                x, y = 100 * line["share"].to_numpy(float), line["accuracy"].to_numpy(float)
                axes.plot(x, y, color=colour, marker=marker, markersize=3.5, linewidth=1, label=label)
                axes.fill_between(
                    x, line["low"].to_numpy(float), line["high"].to_numpy(float), color=colour, alpha=0.12, linewidth=0
                )
            axes.set_title(f"{one_line(model, 30)}, {place}")
            axes.set(xlim=(0, 100), xticks=(0, 25, 50, 75, 100))
            level = baselines.get(model, {}).get(table["task"].iloc[0])
            if level is not None:
                axes.axhline(level, color=INK, linewidth=0.8, linestyle=(0, (6, 4)))
        row[0].set_ylabel("accuracy, %")
    for axes in panels[-1]:
        axes.set_xlabel("tokens dropped, %")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    if any(labels):
        figure.legend(handles, labels, loc="outside lower center", ncols=7)
    return settled(figure)


def _drawn(table: pd.DataFrame) -> pd.DataFrame:
    """Return the rows to draw: all benchmarks together if there are several, the first score."""
    if table.empty:
        return table
    task = "all" if (table["task"] == "all").any() else table["task"].iloc[0]
    return table[(table["task"] == task) & (table["score"] == table["score"].iloc[0])]
