"""Read a recipe, what to do to a model: a YAML file, checked strictly before any work begins."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializeAsAny,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from bivlm.checkpoint.architectures import COMPONENTS, Component, Modules, parse_modules
from bivlm.errors import InputError
from bivlm.methods import method
from bivlm.methods.base import MethodSettings
from bivlm.recipe.budget import BudgetSettings
from bivlm.recipe.calibration import HUB, CalibrationSettings, TokenWeights
from bivlm.recipe.embeddings import RecipeEmbeddings
from bivlm.recipe.finish import FinishSettings
from bivlm.recipe.gate import GateSettings
from bivlm.recipe.pruning import RecipePruning
from bivlm.recipe.search import SearchSettings
from bivlm.untrusted import MAX_YAML_BYTES, parse_yaml, place_of, read_bytes, short

__all__ = [
    "COMPONENTS",
    "CalibrationSettings",
    "Component",
    "Recipe",
    "TokenWeights",
    "default_recipe",
    "load_recipe",
    "parse_recipe",
    "read_recipe",
    "shipped_recipes",
]

CALIBRATED, WEIGHTS_ALONE = "trellis-2bit", "trellis-2bit-weights"
_PROBLEMS = 20  # listed in a message


def _settings(settings: Any) -> MethodSettings:
    if isinstance(settings, MethodSettings):
        return settings
    if not isinstance(settings, dict) or "method" not in settings:
        raise ValueError(f"expected a method's settings with the key 'method', found {short(settings)}")
    try:
        chosen = method(settings["method"]) if isinstance(settings["method"], str) else None
    except InputError as error:
        raise ValueError(str(error)) from None
    if chosen is None:
        raise ValueError(f"'method' must be the name of a method, found {short(settings['method'])}")
    return chosen.Settings.model_validate(settings)


class Recipe(BaseModel):
    """A recipe, format 1. A component that is left out keeps its dtype.

    `modules` name the modules of vision, adaptor and language in the loaded model, for an architecture that bivlm does
    not know; they go before what it knows.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)
    format: Literal[1]
    components: dict[Component, SerializeAsAny[Annotated[MethodSettings, BeforeValidator(_settings)]]] = Field(
        min_length=1
    )
    keep: tuple[str, ...] = ("lm_head",)
    modules: Modules | None = None
    tables: RecipeEmbeddings | None = None
    calibration: CalibrationSettings = CalibrationSettings()
    budget: BudgetSettings | None = None
    search: SearchSettings | None = None
    finish: FinishSettings | None = None
    evaluation: tuple[str, ...] = ()
    pruning: RecipePruning | None = None
    gate: GateSettings | None = None

    @field_validator("finish", mode="before")
    @classmethod
    def _objective_alone(cls, value: Any) -> Any:
        """Expand ``finish: kl`` to ``finish: {objective: kl}``."""
        return {"objective": value} if isinstance(value, str) else value

    @field_validator("budget", mode="before")
    @classmethod
    def _bits_alone(cls, value: Any) -> Any:
        """Expand ``budget: 2.0`` to ``budget: {bits: 2.0}``."""
        return {"bits": float(value)} if isinstance(value, int | float) and not isinstance(value, bool) else value

    @field_validator("pruning", mode="before")
    @classmethod
    def _setting_alone(cls, value: Any) -> Any:
        """Expand ``pruning: {place: ...}`` to ``pruning: {setting: {place: ...}}``."""
        return {"setting": value} if isinstance(value, dict) and "place" in value else value

    @field_validator("search")
    @classmethod
    def _can_be_searched(cls, value: SearchSettings | None, info: ValidationInfo) -> SearchSettings | None:
        if value is None:
            return None
        if info.data.get("budget") is not None:
            raise ValueError("a budget chooses settings already; expected one of budget and search")
        # A key that is not there was refused already; one complaint is enough.
        for component, settings in info.data.get("components", {}).items():
            for offered in value.offered(settings):
                if "inputs" in method(offered.method).needs(offered):
                    raise ValueError(
                        f"the method {offered.method!r} of {component} looks at inputs, with which the blocks would "
                        "have to be searched anew; expected methods that see weights alone"
                    )
        return value

    @field_validator("modules", mode="before")
    @classmethod
    def _modules(cls, value: Any) -> Any:
        try:
            return None if value is None else parse_modules(value)
        except InputError as error:
            raise ValueError(str(error)) from None

    @field_validator("gate")
    @classmethod
    def _asks_what_is_asked(cls, value: GateSettings | None, info: ValidationInfo) -> GateSettings | None:
        # An evaluation that is not in order was refused already.
        if value is None or value.accuracy is None or "evaluation" not in info.data:
            return value
        asked = info.data["evaluation"]
        if not asked:
            raise ValueError("accuracy: expected benchmarks in the recipe's evaluation")
        if missing := [name for name in value.accuracy.benchmarks or () if name not in asked]:
            raise ValueError(
                f"accuracy.benchmarks: {', '.join(missing)}: not in the recipe's evaluation; expected some of "
                f"{', '.join(asked)}"
            )
        return value

    @field_validator("keep", "evaluation", mode="before")
    @classmethod
    def _list_to_tuple(cls, value: Any) -> Any:
        if not isinstance(value, list | tuple):
            raise ValueError("expected a list of names")
        return tuple(value)

    def calibrated_on(self, source: str) -> Recipe:
        """Return the recipe with its samples, as many as before, from `source` alone.

        Raises `InputError` for a source that is none.
        """
        drawn = self.calibration.model_dump(include={"samples", "held_out", "seed", "tokens", "inputs"})
        return parse_recipe(self.canonical() | {"calibration": drawn | {"source": source}}, f"recipe {self.name}")

    def data(self) -> list[str]:
        """Return the folders, files and ids of the hub that calibration and evaluation read."""
        drawn = self.calibration
        sources = [(source or "").removeprefix(HUB) for source in (drawn.source, drawn.images, drawn.text_source)]
        return sources + [task.partition(":")[2] for task in self.evaluation]

    def canonical(self) -> dict[str, Any]:
        """Return the recipe as JSON-ready data with every default written out: what is hashed and stored.

        Without a gate the key is left out, as it was before there were gates: earlier steps are still found.
        """
        data = self.model_dump(mode="json")
        if self.gate is None:
            del data["gate"]
        return data


def shipped_recipes() -> list[str]:
    """Return the names of the recipes that come with the package."""
    folder = resources.files("bivlm.recipe") / "recipes"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def default_recipe(calibration: str | None) -> str:
    """Return the name of the recipe to take where none was: without samples one that looks at the weights alone."""
    return CALIBRATED if calibration else WEIGHTS_ALONE


def load_recipe(name_or_file: str | Path) -> Recipe:
    """Read a shipped recipe by name or any recipe by file.

    Raises `InputError` that gives the path of the offending key, the value found and the valid form.

    >>> import bivlm
    >>> recipe = bivlm.load_recipe("rtn-w2g128")
    >>> recipe.components["language"].method, recipe.components["language"].bits, recipe.keep
    ('rtn', 2, ('lm_head',))
    """
    shipped = shipped_recipes()
    if str(name_or_file) in shipped:
        source = f"recipe {name_or_file}"
        return parse_recipe(parse_yaml(_shipped_text(str(name_or_file)), source), source)
    path = Path(name_or_file)
    if not path.exists():
        raise InputError(f"recipe {short(str(name_or_file))}: no such file, and not one of {', '.join(shipped)}")
    source = f"recipe {path}"
    return parse_recipe(parse_yaml(read_bytes(path, MAX_YAML_BYTES), source), source)


def read_recipe(recipe: str | dict[str, Any]) -> Recipe:
    """Return a recipe that is given by name, by file, or itself."""
    return load_recipe(recipe) if isinstance(recipe, str) else parse_recipe(recipe)


def parse_recipe(data: Any, source: str = "recipe") -> Recipe:
    """Return the recipe in `data` (as read from YAML or JSON); raise `InputError` naming `source` and the key."""
    if not isinstance(data, dict):
        raise InputError(f"{source}: expected a mapping with name, format and components, found {type(data).__name__}")
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        problems = error.errors()
        lines = [f"  {place_of(each)}: {_explained(each)}" for each in problems[:_PROBLEMS]]
        more = [f"  and {len(problems) - _PROBLEMS} more"] if len(problems) > _PROBLEMS else []
        raise InputError("\n".join([f"{source} is not valid:", *lines, *more])) from None


def _explained(error: Mapping[str, Any]) -> str:
    """Return what is wrong, and what was found, of one of pydantic's errors."""
    if error["type"] == "missing":
        return "the key is missing"
    message = "not a key that is known here" if error["type"] == "extra_forbidden" else error["msg"]
    return f"{message}, found {short(error['input'])}"


def _shipped_text(name: str) -> str:
    return (resources.files("bivlm.recipe") / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")
