"""One compression as one HTML page that stands alone: no script, nothing fetched, readable on paper and in the dark."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from bivlm.evaluation.chance import AtChance
from bivlm.reports import figures
from bivlm.reports.bits import EMBEDDINGS, LINEARS, MODEL, named_parts

_TEMPLATE = "report.html"
SAMPLES = "held-out samples"  # what a KL is measured on where nothing else is said
_NONE = "–"
_BITS = ("nominal", "entropy", "stored")
_SHOWN_ELSEWHERE = frozenset({"format", "base_model", "recipe", "bits", "layers", "tables"})
_LAYER_FIGURES = (
    (
        figures.weight_histogram,
        "The cut-offs assume Gaussian weights; KL says how far from that they are. The lower row shows the tails.",
    ),
    (figures.kl_per_layer, "Lines join layers of one kind. The band above each panel has its component's colour."),
    (
        figures.error_by_p_max,
        "Predicted from the weights' statistics, with the recipe's other settings; of large models on some layers and "
        "rows.",
    ),
    (figures.bits_and_error, "Measured on the packed bytes; the entries in the files' headers are not counted here."),
)
_POINTS_CAPTION = (
    "One column per model, one mark per task; the bar is their mean. Dashes are chance. The ring is this compression."
)


@dataclass(frozen=True)
class Drawn:
    """A figure as it is shown: its name, what stands above and below it, and the SVG document."""

    name: str
    title: str
    caption: str
    svg: str

    @classmethod
    def of(cls, name: str, figure: Figure, caption: str = "") -> Drawn:
        """Return `figure`, rendered."""
        return cls(name, figure.get_suptitle(), caption, figures.svg(figure))


def draw_figures(
    layers: Sequence[dict[str, Any]],
    points: Sequence[dict[str, Any]],
    chance: dict[str, float] | None = None,
    measured_on: str = SAMPLES,
) -> list[Drawn]:
    """Draw the figures of a compression, once for the page and for MLflow.

    `layers` are those of compression_report.json with what `bivlm.reports.figures` reads beside. `points`, `chance`
    (percent by task) and `measured_on` are for `figures.accuracy_against_bits`; without points it is left out.
    """
    accuracy = figures.accuracy_against_bits
    drawn = [Drawn.of(accuracy.__name__, accuracy(points, chance, measured_on), _POINTS_CAPTION)] if points else []
    return drawn + [Drawn.of(draw.__name__, draw(layers), caption) for draw, caption in _LAYER_FIGURES]


def render(
    report: dict[str, Any],
    lineage: dict[str, Any] | None,
    evaluation: dict[str, Any] | None,
    drawn: Sequence[Drawn],
    layers: Sequence[dict[str, Any]],
    *,
    chance: dict[str, float] | None = None,
) -> str:
    """Return the page's HTML; equal arguments give equal text.

    `report` is compression_report.json, `layers` and `drawn` as in `draw_figures`. `evaluation` is
    ``{"full_precision": {task: {"n", "metrics": {"accuracy"}, "ci95": [low, high]}}, "packed": the same, "kl",
    "measured_on", "at_chance": [records of `AtChance`]}``. `chance` is percent by task, `lineage` any tree of JSON.
    """
    environment = Environment(
        loader=PackageLoader("bivlm.reports"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters |= {"number": _number, "scalar": _scalar}
    environment.tests["tree"] = lambda value: isinstance(value, (dict, list, tuple))
    rows = _bits_rows(report["bits"])
    return environment.get_template(_TEMPLATE).render(
        model=report["base_model"]["id"],
        recipe=report["recipe"]["name"],
        facts=_facts(report),
        bits=rows,
        total=next((row for row in rows if row["name"] == LINEARS), None),
        whole=next((row for row in rows if row["name"] == MODEL), None),
        accuracy=_accuracy_rows(evaluation or {}, chance or {}),
        chance=bool(chance),
        tasks=len((evaluation or {}).get("full_precision") or ()),
        kl=(evaluation or {}).get("kl"),
        measured_on=(evaluation or {}).get("measured_on") or SAMPLES,
        at_chance=[str(AtChance(**each)) for each in (evaluation or {}).get("at_chance", ())],
        figures=[(inline_svg(figure), figure.caption) for figure in drawn],
        layers=[_layer_row(layer) for layer in layers],
        recipe_yaml=yaml.safe_dump(
            report["recipe"], sort_keys=False, allow_unicode=True, default_flow_style=None, width=96
        ),
        lineage=lineage,
    )


def inline_svg(figure: Drawn) -> Markup:
    """Return the figure as an element of a page: named for screen readers, in the page's ink and on its paper."""
    text = figure.svg[figure.svg.index("<svg ") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, count=1, flags=re.DOTALL)
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>\s*", "", text, count=1, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*">', "<g>", text)  # numbered, so the same in every figure; nothing refers to them
    text = re.sub(f"(fill|stroke): {figures.INK}", r"\1: currentColor", text)
    text = re.sub(f"(fill|stroke): {figures.PAPER}", r"\1: var(--page)", text)
    named = Markup('<svg role="img" aria-label="{}" ').format(figure.title)
    return Markup(text.replace("<svg ", named, 1))


def _facts(report: dict[str, Any]) -> dict[str, Any]:
    base, recipe = report["base_model"], report["recipe"]
    facts = {
        "base model": base["id"],
        "revision": base.get("revision"),
        "base sha256": base.get("sha256"),
        "recipe": recipe["name"],
        "recipe sha256": report.get("recipe_sha256"),
        "code": f"bivlm {report['code_version']}" if report.get("code_version") else None,
        "compression took": _with_unit(report.get("seconds"), "s", 1),
        "peak memory": _with_unit(report.get("peak_memory_bytes"), "MB", 1e-6),
        "relative error": _with_unit(report.get("relative_error"), "of all packed weights", 1),
        "warnings": report.get("warnings") or None,
    }
    named = {"recipe_sha256", "code_version", "seconds", "peak_memory_bytes", "relative_error", "warnings"}
    named |= _SHOWN_ELSEWHERE
    facts |= {key.replace("_", " "): value for key, value in report.items() if key not in named}
    return {key: value for key, value in facts.items() if value is not None}


def _bits_rows(bits: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of the table of bits; `megabytes` are stored bits times weights."""
    rows = []
    for name, part in named_parts(bits):
        row = {key: part.get(key) for key in ("weights", *_BITS)}
        size = None if row["weights"] is None or row["stored"] is None else row["weights"] * row["stored"] / 8e6
        rows.append({"name": name, "part": name not in (LINEARS, EMBEDDINGS, MODEL), "megabytes": size, **row})
    return rows


def _accuracy_rows(evaluation: dict[str, Any], chance: dict[str, float]) -> list[dict[str, Any]]:
    before, after = evaluation.get("full_precision") or {}, evaluation.get("packed") or {}
    rows = [
        {
            "task": task,
            "n": (after.get(task) or before[task]).get("n"),
            "before": _accuracy(before.get(task)),
            "before_interval": _interval(before.get(task)),
            "after": _accuracy(after.get(task)),
            "after_interval": _interval(after.get(task)),
            "chance": chance.get(task),
        }
        for task in dict.fromkeys([*before, *after])
    ]
    if len(rows) > 1:
        mean: dict[str, Any] = {"task": "mean", "n": None, "chance": None}
        for side in ("before", "after"):
            found = [row[side] for row in rows]
            mean |= {side: None if None in found else fmean(found), f"{side}_interval": _NONE}
        rows.append(mean)
    for row in rows:
        row["change"] = None if None in (row["before"], row["after"]) else row["after"] - row["before"]
    return rows


def _accuracy(result: dict[str, Any] | None) -> float | None:
    return ((result or {}).get("metrics") or {}).get("accuracy")


def _interval(result: dict[str, Any] | None) -> str:
    interval = (result or {}).get("ci95")
    return f"{interval[0]:.1f} to {interval[1]:.1f}" if interval else _NONE


def _layer_row(layer: dict[str, Any]) -> dict[str, Any]:
    bits = layer.get("bits") or {}
    shape = " × ".join(map(str, layer["shape"])) if layer.get("shape") else _NONE
    keys = ("name", "component", "error", "kl_gaussian", "seconds")
    return {key: layer.get(key) for key in keys} | {key: bits.get(key) for key in _BITS} | {"shape": shape}


def _with_unit(value: float | None, unit: str, factor: float) -> str | None:
    return None if value is None else f"{value * factor:.3g} {unit}"


def _number(value: float | None, form: str) -> str:
    """Return the value in the format `form`, or a dash where there is none."""
    return _NONE if value is None or not math.isfinite(value) else format(value, form).replace("-", "−")


def _scalar(value: Any) -> Markup | str:
    """Return a leaf of a tree as text: hashes in monospace, nothing as a dash."""
    if value is None or value == "":
        return _NONE
    if isinstance(value, bool):
        return "yes" if value else "no"
    text = str(value)
    if re.fullmatch(r"(\w+:)?[0-9a-f]{12,}", text):
        return Markup('<code class="hash">{}</code>').format(text)
    return text
