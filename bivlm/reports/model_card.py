"""The model card of a packed checkpoint, made from its report and its lineage record alone.

The card is a README.md with the header that the Hugging Face hub reads. Equal records give an equal card.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar

import yaml
from huggingface_hub import ModelCardData
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from jinja2 import Environment, PackageLoader, StrictUndefined
from pydantic import BaseModel, ValidationError

from bivlm.checkpoint.reading import LINEAGE, refuse_links_out_of
from bivlm.errors import InputError
from bivlm.evaluation.chance import set_of
from bivlm.recipe.calibration import held_out_samples
from bivlm.reports.lineage import Lineage
from bivlm.untrusted import MODEL_CONFIG, first_problem, parse_yaml, read_bytes, short

CARD = "README.md"
LICENCE_KEYS = ("license", "license_name", "license_link")
_PACKAGES = ("python", "torch", "transformers")  # of those in a record, the ones that a card names
_UNNAMED = "as-the-base-model"
_FULL, _PACKED, _HELD_OUT = "full precision, ", "packed, ", "held-out samples"
_HUB = "https://huggingface.co"


class _Metrics(BaseModel):
    accuracy: float


class _Score(BaseModel):
    """The figures of a step that asked a benchmark's questions."""

    n: int
    ci95: tuple[float, float]
    metrics: _Metrics


class _Divergence(BaseModel):
    """The figures of a step that compared logits."""

    kl: float


_Figures = TypeVar("_Figures", _Score, _Divergence)


def model_card(report: Mapping[str, Any], lineage: Lineage, name: str, licence_files: Sequence[str] = ()) -> str:
    """Return the card's text, header included.

    `report` is compression_report.json; `name` is what the model is loaded by, a hub id or a folder; `licence_files`
    are the names of the licences beside the weights. Scores, intervals and KL are those of the steps in `lineage`.
    """
    base, bits, recipe = lineage.base_model, report["bits"], report["recipe"]
    licence = _licence_fields(report, lineage, licence_files)
    has_code = any(file.endswith(".py") for file in lineage.packed.files)
    environment = Environment(
        loader=PackageLoader("bivlm.reports"),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=StrictUndefined,
    )
    environment.filters["fixed"] = lambda value, places: "" if value is None else f"{value:.{places}f}"
    return environment.get_template("model_card.jinja").render(
        header=_header(lineage, recipe, licence),
        title=name.rsplit("/", 1)[-1],
        shown=f"[{base.id}]({_HUB}/{base.id})" if base.revision else f"The model in a folder `{Path(base.id).name}`",
        lineage=lineage,
        bits=bits,
        parts={"all packed linears": bits["linears"], **bits["by_component"], "whole model": bits["model"]},
        size=_size(bits["model"]["stored"] * bits["model"]["weights"] / 8),
        recipe_name=recipe["name"],
        version=report["code_version"],
        argument=f"{name!r}{', trust_remote_code=True' if has_code else ''}",
        has_code=has_code,
        scores=_score_rows(lineage),
        # The sentences about chance name question sets, which may be folders.
        at_chance=[_placeless(task) + said.removeprefix(task) for said in report["warnings"] if (task := set_of(said))],
        kl=_kl(lineage),
        measured_on=held_out_samples(_placeless(recipe["calibration"])),
        recipe_yaml=yaml.safe_dump(_placeless(recipe), sort_keys=False, allow_unicode=True, width=118),
        warnings=[said for said in report["warnings"] if set_of(said) is None],
        packages=[f"{key} {value}" for key, value in lineage.packages.items() if key in _PACKAGES],
        licence=_licence(licence, licence_files),
    )


def licence_of(folder: str | Path) -> dict[str, str]:
    """Return what the model card in `folder` says of the licence: those of `LICENCE_KEYS` that it has.

    A card that cannot be read says nothing: it is prose for people.
    """
    file = Path(folder) / CARD
    try:
        refuse_links_out_of([file], Path(folder))
        header = REGEX_YAML_BLOCK.search(read_bytes(file, MODEL_CONFIG.max_bytes).decode("utf-8-sig"))
        data = parse_yaml(header[2], file) if header else {}
    except (OSError, ValueError):
        return {}
    if not isinstance(data, dict):
        return {}
    return {key: data[key] for key in LICENCE_KEYS if isinstance(data.get(key), str)}


def _header(lineage: Lineage, recipe: Mapping[str, Any], licence: Mapping[str, str]) -> str:
    """Return the YAML that the hub reads. A base model that is a folder has no id there and is left out.

    There is no ``model-index``: that needs data sets of the hub, and the benchmarks' questions may be folders.
    """
    base = lineage.base_model
    methods = sorted({settings["method"] for settings in recipe["components"].values()})
    data = ModelCardData(
        base_model=base.id if base.revision else None,
        base_model_relation="quantized" if base.revision else None,
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        tags=["bivlm", *methods, "quantized"],
        license=licence.get("license"),
        license_name=licence.get("license_name"),
        license_link=licence.get("license_link"),
    )
    return data.to_yaml(original_order=[*LICENCE_KEYS, "base_model", "base_model_relation"])


def _licence_fields(report: Mapping[str, Any], lineage: Lineage, files: Sequence[str]) -> dict[str, str]:
    """Return the base model's licence, with a link that works from here; a licence file alone becomes the link."""
    given = {key: value for key, value in (report.get("licence") or {}).items() if key in LICENCE_KEYS}
    if not given:
        return {"license": "other", "license_name": _UNNAMED, "license_link": files[0]} if files else {}
    link, base = given.get("license_link"), lineage.base_model
    if link and "://" not in link and link not in files and base.revision:
        given["license_link"] = f"{_HUB}/{base.id}/blob/{base.revision}/{link}"
    return given


def _licence(fields: Mapping[str, str], files: Sequence[str]) -> str:
    named = fields.get("license_name") or fields.get("license")
    lies = f" The files: {', '.join(f'[{file}]({file})' for file in files)}." if files else ""
    if not named or named == _UNNAMED:
        return f"That of the base model, whose card names none.{lies}"
    link = fields.get("license_link")
    return f"That of the base model: {f'[{named}]({link})' if link else named}.{lies}"


def _size(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"


def _score_rows(lineage: Lineage) -> list[tuple[str, str, str, str]]:
    """Return one row per benchmark, then their mean: name, questions, full precision and packed."""
    names = [name.removeprefix(_PACKED) for name in lineage.evaluations if name.startswith(_PACKED)]
    names = [name for name in names if name != _HELD_OUT]
    packed = [_figures(lineage, _PACKED + name, _Score) for name in names]
    full = [_figures(lineage, _FULL + name, _Score) if _FULL + name in lineage.evaluations else None for name in names]
    rows = [
        (_placeless(name), f"{after.n:,}", _accuracy(before), _accuracy(after))
        for name, before, after in zip(names, full, packed, strict=True)
    ]
    return [*rows, ("mean", "", _mean(full), _mean(packed))] if len(rows) > 1 else rows


def _kl(lineage: Lineage) -> float | None:
    name = _PACKED + _HELD_OUT
    return _figures(lineage, name, _Divergence).kl if name in lineage.evaluations else None


def _figures(lineage: Lineage, name: str, kind: type[_Figures]) -> _Figures:
    """Return the figures of the evaluation `name`; raise `InputError` if they are not of that `kind`."""
    try:
        return kind.model_validate(lineage.steps[lineage.evaluations[name]].figures)
    except ValidationError as error:
        raise InputError(f"{LINEAGE}: figures of {short(name)}: {first_problem(error)}") from None


def _accuracy(score: _Score | None) -> str:
    return "" if score is None else f"{score.metrics.accuracy:.1f} ({score.ci95[0]:.1f} to {score.ci95[1]:.1f})"


def _mean(scores: Sequence[_Score | None]) -> str:
    found = [score.metrics.accuracy for score in scores if score is not None]
    return f"{fmean(found):.1f}" if len(found) == len(scores) else ""


def _placeless(value: Any) -> Any:
    """Return the value without settings that are None, and with folders by name alone: their place is private."""
    if isinstance(value, dict):
        return {key: _placeless(part) for key, part in value.items() if part is not None}
    if isinstance(value, list):
        return [_placeless(part) for part in value]
    if isinstance(value, str):
        kind, separator, place = value.rpartition(":")
        if Path(place).expanduser().is_absolute() and "//" not in place:
            return f"{kind}{separator}{Path(place).name}"
    return value
