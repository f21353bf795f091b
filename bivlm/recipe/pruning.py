"""Recipe settings of pruning: which tokens are dropped, where, and by what score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from bivlm.untrusted import short

Place = Literal["vision", "input", "language", "text", "joint"]
Score = Literal["attention", "last_token", "divprune", "cdpruner", "random", "uniform"]
PLACES: tuple[Place, ...] = get_args(Place)
SCORES: tuple[Score, ...] = get_args(Score)

PAPER_SHARES = (0.25, 0.5, 0.75, 0.863, 0.95, 0.99)  # tables 7 to 13
# What each place can be scored by: attention needs a layer of attention before it, diversity the projected features.
SCORES_AT: dict[Place, tuple[Score, ...]] = {
    "vision": ("attention", "random", "uniform"),
    "input": ("divprune", "cdpruner", "random", "uniform"),
    "language": ("attention", "last_token", "random", "uniform"),
    "text": ("attention", "last_token", "random", "uniform"),
    "joint": ("attention", "random", "uniform"),
}


_MOST_CELLS = 10_000  # of a sweep
PRUNING_KEY = "pruning"  # in a packed checkpoint's quantization config


class PruningSettings(BaseModel):
    """Tokens that are dropped while the model reads its prompt.

    Attributes:
        place: ``vision``: image tokens from layer j of the vision encoder on, and so in the language model;
            ``input``: image tokens before the first layer of the language model; ``language``: image tokens from its
            layer j on; ``text``: text tokens from its layer j on; ``joint``: ``vision`` and ``text`` at once, the
            paper's third strategy.
        layer: j, the first layer that does not see the dropped tokens, counted from 0; not at ``input``.
        share: of the tokens of an image (of a prompt's text) that is dropped, rounded to whole tokens.
        mass: instead of a share, at ``language``: the smallest number of image tokens is kept that receives this
            share of the attention all of them receive, another number for every prompt.
        score: ``attention``: what a token receives in layer j - 1, averaged over query tokens and heads
            (arXiv 2509.18763, equations 21 and 23); ``last_token``: from the last token of the prompt (FastV);
            ``divprune``: greedy max-min cosine distance (arXiv 2503.02175); ``cdpruner``: a determinantal point process
            conditioned on the prompt (arXiv 2506.10967); ``random`` and ``uniform`` (evenly spaced) as controls.
        seed: of ``random``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    place: Place
    layer: int | None = Field(default=None, validate_default=True)
    share: float | None = Field(default=None, ge=0, lt=1, allow_inf_nan=False)
    mass: float | None = Field(default=None, gt=0, le=1, allow_inf_nan=False, validate_default=True)
    score: Score = Field(default="attention", validate_default=True)
    seed: int = Field(default=0, ge=0)

    @field_validator("layer")
    @classmethod
    def _where_there_are_layers(cls, value: int | None, info: ValidationInfo) -> int | None:
        place = info.data.get("place")
        if place == "input" and value is not None:
            raise ValueError("place 'input' is before the first layer; expected no layer")
        if place not in (None, "input") and (value is None or value < 1):
            raise ValueError(
                f"place {place!r}: expected a layer from 1 on, whose predecessor tells which tokens matter"
                + ("; before the first layer is place 'input'" if place == "language" else "")
            )
        return value

    @field_validator("mass")
    @classmethod
    def _share_or_mass(cls, value: float | None, info: ValidationInfo) -> float | None:
        share = info.data.get("share")
        if "share" in info.data and (value is None) == (share is None):
            raise ValueError("expected either share or mass")
        if value is not None and info.data.get("place") not in (None, "language"):
            raise ValueError(f"only at place 'language', place is {info.data['place']!r}")
        return value

    @field_validator("score")
    @classmethod
    def _known_there(cls, value: Score, info: ValidationInfo) -> Score:
        place = info.data.get("place")
        if place is not None and value not in SCORES_AT[place]:
            raise ValueError(f"at place {place!r} expected one of {', '.join(SCORES_AT[place])}")
        if info.data.get("mass") is not None and value not in ("attention", "last_token"):
            raise ValueError("mass is of attention; expected the score attention or last_token")
        return value

    @property
    def label(self) -> str:
        """A short name: place, layer, share and score."""
        layer = "" if self.layer is None else f" from layer {self.layer}"
        much = f"{100 * self.share:g} %" if self.share is not None else f"mass {100 * (self.mass or 0):g} % kept"
        return f"{self.place}{layer}, {much}, {self.score}"


class SweepSettings(BaseModel):
    """Recipe settings of a sweep.

    Attributes:
        places: where tokens are dropped, see `PruningSettings`.
        layers: the first layers that do not see them; for all places, or by place. At ``input`` there is none.
        shares: of the tokens that are dropped; by default the paper's.
        scores: by which they are chosen; a score that is not known at a place is left out there.
        masses: adaptive cells at ``language``, of every layer and every score that is of attention: each keeps that
            share of the attention, and is compared with a fixed share that keeps as many tokens on average.
        questions: asked in every cell, the first ones of every benchmark; all of them if it is not given.
        seed: of the score ``random``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    places: tuple[Place, ...] = Field(default=("vision", "language", "joint"), min_length=1)
    layers: tuple[int, ...] | dict[Place, tuple[int, ...]] = (2,)
    shares: tuple[float, ...] = Field(default=PAPER_SHARES, min_length=1)
    scores: tuple[Score, ...] = Field(default=("attention",), min_length=1)
    masses: tuple[float, ...] = ()
    questions: int | None = Field(default=None, ge=1)
    seed: int = Field(default=0, ge=0)

    @field_validator("places", "layers", "shares", "scores", "masses", mode="before")
    @classmethod
    def _lists(cls, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: tuple(each) if isinstance(each, list) else each for key, each in value.items()}
        return tuple(value) if isinstance(value, list) else value

    @model_validator(mode="after")
    def _all_can_be(self) -> SweepSettings:
        layers = self.layers.values() if isinstance(self.layers, dict) else [self.layers]
        parts = (self.places, self.scores, max(layers, key=len, default=()), self.shares + self.masses)
        if (count := prod(len(part) or 1 for part in parts)) > _MOST_CELLS:
            raise ValueError(f"expected at most {_MOST_CELLS:,} cells, found {count:,}")
        if isinstance(self.layers, dict) and (without := sorted(set(self.places) - {"input"} - set(self.layers))):
            raise ValueError(f"layers: expected layers for every place, found none for {', '.join(without)}")
        for place in self.places:
            if not set(self.scores) & set(SCORES_AT[place]):
                raise ValueError(f"scores: at place {place!r} expected one of {', '.join(SCORES_AT[place])}")
        try:
            self.cells()
            if self.masses and not self.adaptive_cells():
                raise ValueError("masses: expected the place 'language' and the score attention or last_token")
        except ValidationError as error:
            first = error.errors()[0]
            key, found = ".".join(map(str, first["loc"])), short(first["input"])
            raise ValueError(f"{key}: {first['msg']}, found {found}") from None
        return self

    def cells(self) -> list[PruningSettings]:
        """Return every possible combination, in order: place, score, layer, share."""
        return [
            PruningSettings(place=place, score=score, layer=layer, share=share, seed=self.seed)
            for place in self.places
            for score in self.scores
            if score in SCORES_AT[place]
            for layer in self._layers_at(place)
            for share in self.shares
        ]

    def adaptive_cells(self) -> list[PruningSettings]:
        """Return the cells that keep a share of the attention, in order: score, layer, mass."""
        return [
            PruningSettings(place="language", score=score, layer=layer, mass=mass)
            for score in self.scores
            if score in ("attention", "last_token") and "language" in self.places
            for layer in self._layers_at("language")
            for mass in self.masses
        ]

    def _layers_at(self, place: Place) -> Sequence[int | None]:
        if place == "input":
            return (None,)
        return self.layers.get(place, ()) if isinstance(self.layers, dict) else self.layers


class RecipePruning(BaseModel):
    """Recipe settings of pruning; at least one of the two.

    Attributes:
        setting: what the packed checkpoint carries, to be applied when it is loaded for use; its accuracy and its
            divergence are measured with it.
        sweep: cells to try on both models, full precision and packed, each without the setting.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    setting: PruningSettings | None = None
    sweep: SweepSettings | None = None

    @model_validator(mode="after")
    def _says_something(self) -> RecipePruning:
        if self.setting is None and self.sweep is None:
            raise ValueError("expected a setting (place, layer, share, score), a sweep, or both")
        return self
