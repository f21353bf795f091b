"""The model card of a packed checkpoint, made of its report and its lineage record and nothing else.

A README.md with the header that the Hugging Face hub reads. Equal records give an equal card.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from pydantic import BaseModel, ValidationError

from bivlm.checkpoint.reading import LINEAGE, refuse_links_out_of
from bivlm.errors import InputError
from bivlm.evaluation.chance import set_of
from bivlm.recipe.calibration import held_out_samples
from bivlm.reports.lineage import Lineage
from bivlm.untrusted import MODEL_CONFIG, first_problem, parse_yaml, read_bytes, short

CARD = "README.md"
LICENCE_KEYS = ("license", "license_name", "license_link")
_FULL, _PACKED, _HELD_OUT = "full precision, ", "packed, ", "held-out samples"
_HUB = "https://huggingface.co"
_CARD = """---
{header}---

# {title}

{base} compressed to **{stored:.3f} stored bits a weight** in {layers} linear layers, and {model:.2f} bits a parameter
in the whole model ({size}), by bivlm with the recipe `{recipe}`. Stored bits are the bytes of the files;
accuracy is measured on the model loaded from these bytes.

## How to load it

With bivlm {version} or later installed:

```python
import bivlm  # registers the format; without it, loading fails instead of filling in random weights
from transformers import AutoModelForImageTextToText, AutoProcessor

processor = AutoProcessor.from_pretrained({name!r}{trust})
model = AutoModelForImageTextToText.from_pretrained({name!r}{trust})
```

The weights are rebuilt while loading. With `quantization_config=BiVLMConfig(dequantize="forward")` from
`bivlm.checkpoint.transformers_plugin` they stay packed in memory, and are rebuilt each time a layer is called.{code}

## Bits

| | weights | nominal | entropy | **stored** |
|---|---:|---:|---:|---:|
{bits}

*Nominal* is the count of the method's paper, *entropy* the least that any decoder of the format needs, *stored* the
bytes on disk, headers included.

## What it can do

{scores}

## How it was made

```yaml
{recipe_yaml}```
{warnings}
## Where it comes from

{lineage}

`lineage.json` holds every step with the hashes of what it read and made; `bivlm lineage DIR` checks a downloaded copy
against it.

## Licence

{licence}
"""
_CODE = """

The base model comes with code of its own, which is here too and runs when the model is loaded: read it."""


class _Metrics(BaseModel):
    accuracy: float


class _Score(BaseModel):
    """Of a step that asked a benchmark's questions."""

    n: int
    ci95: tuple[float, float]
    metrics: _Metrics


class _Divergence(BaseModel):
    """Of a step that compared logits."""

    kl: float


def model_card(report: Mapping[str, Any], lineage: Lineage, name: str, licence_files: Sequence[str] = ()) -> str:
    """The card's text, header included.

    `report` is compression_report.json; `name` is what the model is loaded by, a hub id or a folder; `licence_files`
    are the names of the licences beside the weights. Scores, intervals and KL are those of the steps in `lineage`.
    """
    base, bits = lineage.base_model, report["bits"]
    # The sentences about chance name question sets, which may be folders.
    at_chance = [_placeless(task) + said.removeprefix(task) for said in report["warnings"] if (task := set_of(said))]
    warnings = [said for said in report["warnings"] if set_of(said) is None]
    shown = f"[{base.id}]({_HUB}/{base.id})" if base.revision else f"The model in a folder `{Path(base.id).name}`"
    remote = any(file.endswith(".py") for file in lineage.packed.files)
    return _CARD.format(
        header=yaml.safe_dump(header(report, lineage, licence_files), sort_keys=False, allow_unicode=True, width=118),
        title=name.rsplit("/", 1)[-1],
        base=shown,
        stored=bits["linears"]["stored"],
        model=bits["model"]["stored"],
        size=_size(bits["model"]["stored"] * bits["model"]["weights"] / 8),
        layers=len(lineage.layers),
        recipe=report["recipe"]["name"],
        version=report["code_version"],
        name=name,
        trust=", trust_remote_code=True" if remote else "",
        code=_CODE if remote else "",
        bits="\n".join(_bits(bits)),
        scores="\n".join(_scores(lineage, report["recipe"], at_chance)),
        recipe_yaml=yaml.safe_dump(_placeless(report["recipe"]), sort_keys=False, allow_unicode=True, width=118),
        warnings="".join(f"\n- {said}" for said in warnings) + "\n" if warnings else "",
        lineage="\n".join(f"- {what}: {value}" for what, value in _lineage(lineage)),
        licence=_licence(report, lineage, licence_files),
    )


def header(report: Mapping[str, Any], lineage: Lineage, licence_files: Sequence[str] = ()) -> dict[str, Any]:
    """What the hub reads of the card. A base model that is a folder has no id there, so that it is left out.

    There is no ``model-index``: that wants data sets of the hub, and the benchmarks' questions need not be.
    """
    base = lineage.base_model
    methods = sorted({settings["method"] for settings in report["recipe"]["components"].values()})
    known = _licence_fields(report, lineage, licence_files)
    return {
        **known,
        **({"base_model": base.id, "base_model_relation": "quantized"} if base.revision else {}),
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": list(dict.fromkeys(["bivlm", *methods, "quantized"])),
    }


def licence_of(folder: str | Path) -> dict[str, str]:
    """What the model card in `folder` says of the licence: ``license``, ``license_name``, ``license_link``, if it does.

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


def _licence_fields(report: Mapping[str, Any], lineage: Lineage, files: Sequence[str]) -> dict[str, str]:
    """The base's, with a link that leads somewhere from here; where only a file says it, that is the link."""
    given = {key: value for key, value in (report.get("licence") or {}).items() if key in LICENCE_KEYS}
    if not given:
        return {"license": "other", "license_name": "as-the-base-model", "license_link": files[0]} if files else {}
    link, base = given.get("license_link"), lineage.base_model
    if link and "://" not in link and link not in files and base.revision:
        given["license_link"] = f"{_HUB}/{base.id}/blob/{base.revision}/{link}"
    return given


def _licence(report: Mapping[str, Any], lineage: Lineage, files: Sequence[str]) -> str:
    fields = _licence_fields(report, lineage, files)
    named = fields.get("license_name") or fields.get("license")
    lies = f" The files: {', '.join(f'[{file}]({file})' for file in files)}." if files else ""
    if not named or (named == "as-the-base-model"):
        return f"That of the base model, whose card names none.{lies}"
    link = fields.get("license_link")
    return f"That of the base model: {f'[{named}]({link})' if link else named}.{lies}"


def _size(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"


def _bits(bits: Mapping[str, Any]) -> Iterator[str]:
    rows = [("all packed linears", bits["linears"]), *bits["by_component"].items(), ("whole model", bits["model"])]
    for name, part in rows:
        figures = [f"{part[key]:.3f}" if key in part else "" for key in ("nominal", "entropy")]
        yield f"| {name} | {part['weights']:,} | {' | '.join(figures)} | **{part['stored']:.3f}** |"


def _scores(lineage: Lineage, recipe: Mapping[str, Any], at_chance: Sequence[str]) -> Iterator[str]:
    figures = {name: lineage.steps[key].figures for name, key in lineage.evaluations.items()}
    benchmarks = [name.removeprefix(_PACKED) for name in figures if name.startswith(_PACKED)]
    benchmarks = [name for name in benchmarks if name != _HELD_OUT]
    for name in benchmarks:
        asked = [role + name for role in (_FULL, _PACKED) if role + name in figures]
        figures |= {each: _checked(each, figures, _Score) for each in asked}
    if not benchmarks:
        yield "It was not evaluated."
        return
    yield "Percent right with bootstrap intervals of 95 %, both models on the same questions, greedily."
    yield ""
    yield "| | questions | full precision | packed |"
    yield "|---|---:|---:|---:|"
    for name in benchmarks:
        packed = figures[_PACKED + name]
        yield f"| {_placeless(name)} | {packed['n']:,} | {_accuracy(figures.get(_FULL + name))} | {_accuracy(packed)} |"
    if len(benchmarks) > 1:
        yield f"| mean | | {_mean(figures, _FULL, benchmarks)} | {_mean(figures, _PACKED, benchmarks)} |"
    if at_chance:
        yield ""
        yield "Full precision is not above chance everywhere:"
        yield ""
        yield from (f"- {said}" for said in at_chance)
    if _PACKED + _HELD_OUT in figures:
        divergence = _checked(_PACKED + _HELD_OUT, figures, _Divergence)
        yield ""
        kl, samples = f"{divergence['kl']:.3g} nats a token", held_out_samples(_placeless(recipe["calibration"]))
        yield f"KL divergence from full precision: {kl}, on {samples}, which calibration has not seen."


def _checked(name: str, figures: Mapping[str, Any], kind: type[BaseModel]) -> dict[str, Any]:
    """Return the figures of one step that are shown; raises `InputError` naming one that is not of its kind."""
    try:
        return kind.model_validate(figures[name]).model_dump()
    except ValidationError as error:
        raise InputError(f"{LINEAGE}: figures of {short(name)}: {first_problem(error)}") from None


def _accuracy(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return ""
    low, high = found["ci95"]
    return f"{found['metrics']['accuracy']:.1f} ({low:.1f} to {high:.1f})"


def _mean(figures: Mapping[str, Mapping[str, Any]], role: str, benchmarks: Sequence[str]) -> str:
    found = [figures[role + name]["metrics"]["accuracy"] for name in benchmarks if role + name in figures]
    return f"{fmean(found):.1f}" if len(found) == len(benchmarks) else ""


def _placeless(value: Any) -> Any:
    """The value without what was not set, and folders by their names alone: where they lay is nobody's business."""
    if isinstance(value, dict):
        return {key: _placeless(part) for key, part in value.items() if part is not None}
    if isinstance(value, list):
        return [_placeless(part) for part in value]
    if isinstance(value, str):
        kind, separator, place = value.rpartition(":")
        if Path(place).expanduser().is_absolute() and "//" not in place:
            return f"{kind}{separator}{Path(place).name}"
    return value


def _lineage(lineage: Lineage) -> Iterator[tuple[str, str]]:
    base = lineage.base_model
    yield "base model", f"{base.id if base.revision else 'a folder'}, sha256 `{base.sha256}` over its files"
    if base.revision:
        yield "revision", f"`{base.revision}`"
    yield "recipe", f"sha256 `{lineage.recipe_sha256}`"
    yield "packed files", f"sha256 `{lineage.packed.sha256}`"
    commit = f", commit `{lineage.code['commit']}`" if lineage.code.get("commit") else ""
    yield "code", f"bivlm {lineage.code['version']}{commit}{' with changes' if lineage.code.get('changed') else ''}"
    named = ("python", "torch", "transformers")
    yield "packages", ", ".join(f"{name} {lineage.packages[name]}" for name in named if name in lineage.packages)
    yield "hardware", lineage.hardware.get("gpu") or f"{lineage.hardware.get('processor')}, no GPU"
    yield "made", f"{lineage.created}, in {len(lineage.steps)} recorded steps"
