"""The tags that bivlm writes in MLflow: their names, and what those of a registered version say."""

from __future__ import annotations

import re
from collections.abc import Mapping
from statistics import fmean

from mlflow.entities.model_registry import ModelVersion
from pydantic import BaseModel, ConfigDict, Field, model_validator

from bivlm.errors import InputError
from bivlm.untrusted import parse_model

LONGEST = 4000  # of the 5,000 characters that the registry's columns have
PASSED, REFUSED, UNDECIDED = "passed", "refused", "not decided"
ALL, NOTHING = "all", "0"  # questions of a benchmark; else the first so many
NONE = "none"
NOT_RECORDED = "not recorded"


class Tag:
    """The names. They never change, so that what older versions of bivlm wrote is still found."""

    # where a run, a model or a version comes from
    REQUEST = "bivlm.request"
    ROLE = "bivlm.role"  # compression | full precision | packed | pruned | pruning sweep | leaderboard
    BASE_ID = "bivlm.base.id"
    BASE_SHA256 = "bivlm.base.sha256"
    BASE_REVISION = "bivlm.base.revision"
    RECIPE = "bivlm.recipe"
    RECIPE_SHA256 = "bivlm.recipe.sha256"
    CODE_VERSION = "bivlm.code_version"
    TRIGGER = "bivlm.trigger"
    PACKED = "bivlm.packed.sha256"
    SAMPLES = "bivlm.calibration.sha256"  # those that the KL is measured on are among them
    NOT_ABOVE_CHANCE = "bivlm.not_above_chance"  # the sentences of `AtChance`, or none
    # a run
    BENCHMARKS = "bivlm.benchmarks"
    DOCUMENTS = "bivlm.documents"
    SUBJECT = "bivlm.evaluated"  # checkpoint and benchmark of an evaluation
    CELL = "bivlm.cell"  # of a sweep: what was pruned, and how
    SWEEP = "bivlm.sweep"  # of the sweep's own run: all of its rows
    BOARD = "bivlm.board"
    # a version
    MODEL = "bivlm.model_id"
    BASE_MODEL = "bivlm.base.model_id"
    EXPERIMENT = "bivlm.experiment"
    CALIBRATION = "bivlm.calibration"
    MADE = "bivlm.made"
    LINEARS = "bivlm.bits.linears"
    WHOLE_MODEL = "bivlm.bits.model"
    KL = "bivlm.kl"
    KL_SAMPLES = "bivlm.kl.samples"  # what the KL was measured on, in words
    QUESTIONS = "bivlm.questions"  # of each of the recipe's benchmarks: all, the first so many, or 0
    GATE = "bivlm.gate"  # passed | refused | not decided; a recipe without a gate has none
    GATE_REASONS = "bivlm.gate.reasons"
    GATE_QUESTIONS = "bivlm.gate.questions"
    RECORDED = "bivlm.recorded"  # when everything about it was there
    # what follows a prefix
    OURS = "bivlm."
    ACCURACY = "bivlm.accuracy."  # benchmark: `Score`
    STAGE = "bivlm.stage."  # stage: hash
    MOVE = "bivlm.move."  # number and random letters: `tasks.tracking.champions.Move`
    CODE = "bivlm.code."
    HARDWARE = "bivlm.hardware."
    # MLflow's own
    NOTE = "mlflow.note.content"
    SOURCE = "mlflow.source.name"
    PARENT = "mlflow.parentRunId"
    VERSIONS = "mlflow.modelVersions"


class Score(BaseModel):
    """Accuracy on a benchmark in percent, and what was lost with its 95 % interval; as text a sentence."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    packed: float
    full_precision: float
    questions: int
    lost: float
    low: float
    high: float

    def __str__(self) -> str:
        return (
            f"{self.packed:.1f} of {self.full_precision:.1f} % on {self.questions:,} questions; lost "
            f"{self.lost:.1f} ({self.low:.1f} to {self.high:.1f})"
        )


_NUMBER = r"(-?[\d.,]+)"
_SENTENCE = re.compile(rf"{_NUMBER} of {_NUMBER} % on {_NUMBER} questions; lost {_NUMBER} \({_NUMBER} to {_NUMBER}\)")


def read_score(value: str) -> Score | str:
    """Return the score that a tag holds, or the tag as it stands if it is none."""
    if old := _SENTENCE.fullmatch(value):  # as versions of bivlm before `Score` wrote it
        numbers = (number.replace(",", "") for number in old.groups())
        return Score.model_validate(dict(zip(Score.model_fields, numbers, strict=True)))
    try:
        return parse_model(Score, value, "accuracy", "a score")
    except InputError:
        return value


class VersionTags(BaseModel):
    """What the tags of a registered version say; None for what it does not have."""

    model_config = ConfigDict(frozen=True)

    model_id: str | None = Field(None, alias=Tag.MODEL)
    request: str | None = Field(None, alias=Tag.REQUEST)
    base_id: str | None = Field(None, alias=Tag.BASE_ID)
    base_sha256: str | None = Field(None, alias=Tag.BASE_SHA256)
    base_revision: str | None = Field(None, alias=Tag.BASE_REVISION)
    base_model_id: str | None = Field(None, alias=Tag.BASE_MODEL)
    experiment: str = Field("0", alias=Tag.EXPERIMENT)
    recipe: str | None = Field(None, alias=Tag.RECIPE)
    recipe_sha256: str | None = Field(None, alias=Tag.RECIPE_SHA256)
    calibration: str | None = Field(None, alias=Tag.CALIBRATION)
    samples_sha256: str | None = Field(None, alias=Tag.SAMPLES)
    trigger: str | None = Field(None, alias=Tag.TRIGGER)
    made: str | None = Field(None, alias=Tag.MADE)
    code_version: str | None = Field(None, alias=Tag.CODE_VERSION)
    packed_sha256: str | None = Field(None, alias=Tag.PACKED)
    linears: str | None = Field(None, alias=Tag.LINEARS)
    whole_model: str | None = Field(None, alias=Tag.WHOLE_MODEL)
    kl: str | None = Field(None, alias=Tag.KL)
    kl_samples: str = Field("held-out samples", alias=Tag.KL_SAMPLES)
    not_above_chance: str = Field(NONE, alias=Tag.NOT_ABOVE_CHANCE)
    questions: str = Field(NOTHING, alias=Tag.QUESTIONS)
    gate: str | None = Field(None, alias=Tag.GATE)
    gate_reasons: str | None = Field(None, alias=Tag.GATE_REASONS)
    gate_questions: int = Field(0, alias=Tag.GATE_QUESTIONS)
    recorded: str | None = Field(None, alias=Tag.RECORDED)
    scores: dict[str, Score | str] = {}  # by benchmark
    stages: dict[str, str] = {}

    @model_validator(mode="before")
    @classmethod
    def _gather(cls, tags: Mapping[str, str]) -> dict[str, object]:
        scores = {benchmark: read_score(value) for benchmark, value in below(tags, Tag.ACCURACY).items()}
        return {**tags, "scores": scores, "stages": below(tags, Tag.STAGE)}

    @property
    def at_chance(self) -> bool:
        """Whether full precision is not above chance on one of the benchmarks."""
        return self.not_above_chance != NONE

    @property
    def passed(self) -> bool:
        """Whether nothing speaks against the version: its gate let it pass, or it has none."""
        return self.gate in (None, PASSED)

    @property
    def accuracy(self) -> str:
        """The mean over all benchmarks, packed and in full precision; a dash where nothing was evaluated."""
        scores = [score for score in self.scores.values() if isinstance(score, Score)]
        if not scores:
            return "-"
        packed, before = fmean(each.packed for each in scores), fmean(each.full_precision for each in scores)
        return f"{packed:.1f} of {before:.1f} %{' (not above chance)' * self.at_chance}"


def tags_of(version: ModelVersion) -> VersionTags:
    """Return what the tags of a registered version say."""
    return VersionTags.model_validate(version.tags)


def as_many(asked: str, wanted: str) -> bool:
    """Return whether as many questions were `asked` as are `wanted`."""
    return asked == ALL or (wanted != ALL and int(asked) >= int(wanted))


def below(tags: Mapping[str, str], prefix: str) -> dict[str, str]:
    """Return the tags with a prefix, by what follows it."""
    return {key.removeprefix(prefix): value for key, value in tags.items() if key.startswith(prefix)}


def having(tags: Mapping[str, str]) -> str:
    """Return MLflow's filter for what has all of these tags."""
    return " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())
