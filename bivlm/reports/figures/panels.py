"""Layers side by side, in model order, a panel for each component."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import FigureBase

from bivlm.reports.figures.style import COMPONENT_COLOURS, MUTED, finite_number, one_line

_BLOCK = re.compile(r"[^.]+\.\d+\.")  # "layers.3."


@dataclass(frozen=True)
class Panel:
    """A component's axes, from top to bottom, and which of its layers are drawn, by their place in the component."""

    component: str
    rows: list[Axes]
    drawn: dict[int, dict[str, Any]]


def panels_of(
    figure: FigureBase, layers: Sequence[dict[str, Any]], known: list[dict[str, Any]], rows: int = 1
) -> list[Panel]:
    """Return a column of axes for each component that has a layer in `known`; they share their vertical axes.

    The horizontal axis counts the component's layers in model order, including those not drawn; its ticks are block
    numbers, or the names of layers that belong to no block.
    """
    chosen = {id(layer) for layer in known}
    groups = {
        component: members
        for component, members in by_component(layers).items()
        if any(id(layer) in chosen for layer in members)
    }
    widest = sum(map(len, groups.values()))
    shares = [max(len(members) / widest, 0.12) for members in groups.values()]
    grid = figure.subplots(rows, len(groups), sharex="col", sharey="row", squeeze=False, width_ratios=shares)
    panels = []
    for (component, members), share, column in zip(groups.items(), shares, grid.T, strict=True):
        column[0].spines["top"].set(visible=True, color=colour_of(component), linewidth=3)
        column[0].set_xlim(-0.8, len(members) - 0.2)
        column[0].set_title(component)
        _mark_blocks(column[-1], [layer["name"] for layer in members], room=max(1, round(24 * share / sum(shares))))
        drawn = {position: layer for position, layer in enumerate(members) if id(layer) in chosen}
        panels.append(Panel(component, list(column), drawn))
    return panels


def _mark_blocks(axes: Axes, names: list[str], room: int) -> None:
    """Set at most about `room` ticks, where blocks begin."""
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
        few = [short_name(name) for name in names[: 2 * room]]
        axes.set_xticks(range(len(few)), few, rotation=30, ha="right", rotation_mode="anchor")


def by_component(layers: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Return layers by component, both in the order in which they come."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for layer in layers:
        groups.setdefault(layer["component"], []).append(layer)
    return groups


def having(layers: Sequence[dict[str, Any]], key: str) -> list[dict[str, Any]]:
    """Return the layers whose `key` is a finite number."""
    return [layer for layer in layers if finite_number(layer.get(key)) is not None]


def colour_of(component: str) -> str:
    """Return the component's colour, the same in every figure."""
    return COMPONENT_COLOURS.get(component, MUTED)


def short_name(name: str) -> str:
    """Return the layer's name from its numbered block on, else its last part that says something ("mlp.0", not "0")."""
    match, parts = _BLOCK.search(name), name.split(".")
    return one_line(name[match.start() :] if match else ".".join(parts[-2:] if parts[-1].isdigit() else parts[-1:]))
