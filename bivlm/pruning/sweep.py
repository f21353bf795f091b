"""A sweep: every combination of place, layer, share and score, and the tables made of what came of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from bivlm.pruning.settings import SCORES_AT, Place, PruningSettings, Score

PAPER_SHARES = (0.25, 0.5, 0.75, 0.863, 0.95, 0.99)


class SweepSettings(BaseModel):
    """What a recipe may say about a sweep.

    Attributes:
        places: where tokens are dropped, see `PruningSettings`.
        layers: the first layers that do not see them; for all places, or by place. At ``input`` there is none.
        shares: of the tokens that are dropped; by default the paper's.
        scores: by which they are chosen; a score that is not known at a place is left out there.
        questions: asked in every cell, the first ones of every benchmark; all of them if it is not given.
        seed: of the score ``random``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    places: tuple[Place, ...] = Field(default=("vision", "language", "joint"), min_length=1)
    layers: tuple[int, ...] | dict[Place, tuple[int, ...]] = (2,)
    shares: tuple[float, ...] = Field(default=PAPER_SHARES, min_length=1)
    scores: tuple[Score, ...] = Field(default=("attention",), min_length=1)
    questions: int | None = Field(default=None, ge=1)
    seed: int = Field(default=0, ge=0)

    @field_validator("places", "layers", "shares", "scores", mode="before")
    @classmethod
    def _lists(cls, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: tuple(each) if isinstance(each, list) else each for key, each in value.items()}
        return tuple(value) if isinstance(value, list) else value

    @model_validator(mode="after")
    def _all_can_be(self) -> SweepSettings:
        if isinstance(self.layers, dict) and (without := sorted(set(self.places) - {"input"} - set(self.layers))):
            raise ValueError(f"layers: expected layers for every place, found none for {', '.join(without)}")
        for place in self.places:
            if not set(self.scores) & set(SCORES_AT[place]):
                raise ValueError(f"scores: at place {place!r} expected one of {', '.join(SCORES_AT[place])}")
        try:
            self.cells()
        except ValidationError as error:
            first = error.errors()[0]
            raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}, found {first['input']!r}") from None
        return self

    def cells(self) -> list[PruningSettings]:
        """Every combination that there is, in order: place, score, layer, share."""
        return [
            PruningSettings(place=place, score=score, layer=layer, share=share, seed=self.seed)
            for place in self.places
            for score in self.scores
            if score in SCORES_AT[place]
            for layer in self._layers_at(place)
            for share in self.shares
        ]

    def _layers_at(self, place: Place) -> Sequence[int | None]:
        if place == "input":
            return (None,)
        return self.layers.get(place, ()) if isinstance(self.layers, dict) else self.layers


ROW = (
    *("model", "task", "place", "score", "layer", "share", "n", "accuracy", "low", "high"),
    *("loss", "loss_low", "loss_high", "p_value", "kept_image", "kept_text", "refused"),
)


def as_table(rows: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """A row a model, benchmark and cell, with the columns `ROW`.

    Accuracy and loss against the same model without pruning are in percent and percentage points with their 95 %
    intervals; ``kept_image`` and ``kept_text`` are shares of tokens. A cell that could not be has the reason in
    ``refused`` and no figures.
    """
    table = pd.DataFrame(list(rows), columns=list(ROW)).astype({"layer": "Int64", "n": "Int64"})
    return table.sort_values(["model", "task", "place", "score", "layer", "share"], kind="stable", ignore_index=True)


def grid(
    table: pd.DataFrame, model: str, task: str, place: Place, score: Score, value: str = "accuracy"
) -> pd.DataFrame:
    """One of the paper's tables (7 to 21): a row a layer, a column a share.

    At ``input``, where there is no layer, the only row is called "-".
    """
    chosen = table.query("model == @model and task == @task and place == @place and score == @score")
    named = chosen.assign(layer=chosen["layer"].astype("object").where(chosen["layer"].notna(), "-"))
    wide = named.pivot(index="layer", columns="share", values=value)
    return wide.rename(columns=lambda share: f"{100 * share:g} %").rename_axis(index="layer", columns=None)
