"""The results of a sweep as tables: a long one, and those of the paper."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd

from bivlm.recipe.pruning import Place, Score

_NAMES = ("model", "task", "place", "score")
ROW = (
    *("model", "task", "place", "score", "layer", "share", "n", "accuracy", "low", "high"),
    *("loss", "loss_low", "loss_high", "p_value", "kept_image", "kept_text", "refused", "checkpoint"),
)


def as_table(rows: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """Return one row per model, benchmark and cell, with the columns `ROW`.

    Accuracy and loss against the same model without pruning are in percent and percentage points with their 95 %
    intervals; ``kept_image`` and ``kept_text`` are shares of tokens. A cell that could not be has the reason in
    ``refused`` and no figures. ``checkpoint`` is the model's sha256. Names stand in the order in which they first
    come, layers and shares in theirs.
    """
    table = pd.DataFrame(list(rows), columns=list(ROW)).astype({"layer": "Int64", "n": "Int64"})
    asked = {key: {name: number for number, name in enumerate(dict.fromkeys(table[key]))} for key in _NAMES}
    return table.sort_values(
        [*_NAMES, "layer", "share"],
        key=lambda column: column.map(asked[column.name]) if column.name in asked else column,
        kind="stable",
        ignore_index=True,
    )


def grid(
    table: pd.DataFrame, model: str, task: str, place: Place, score: Score, value: str = "accuracy"
) -> pd.DataFrame:
    """Return one of the paper's tables (7 to 21): one row per layer, one column per share.

    At ``input``, where there is no layer, the only row is called "-".
    """
    chosen = table.query("model == @model and task == @task and place == @place and score == @score")
    named = chosen.assign(layer=chosen["layer"].astype("object").where(chosen["layer"].notna(), "-"))
    wide = named.pivot(index="layer", columns="share", values=value)
    return wide.rename(columns=lambda share: f"{100 * share:g} %").rename_axis(index="layer", columns=None)
