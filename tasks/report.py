"""compression_report.json: what was compressed, how, and what it costs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from statistics import fmean
from typing import Any

from bivlm.checkpoint.reading import REPORT
from bivlm.errors import InputError
from bivlm.evaluation.chance import AtChance, set_of
from bivlm.recipe.loading import Recipe
from bivlm.reports.bits import bits_of
from bivlm.reports.leaderboard.entries import relative_error
from bivlm.reports.lineage import Lineage
from bivlm.reports.model_card import licence_of
from bivlm.reports.report_page import render
from bivlm.untrusted import read_object
from bivlm.workspace.hashing import digest
from bivlm.workspace.stores.folder import write_atomically
from tasks.checkpoint import Base
from tasks.embeddings import Table
from tasks.layers import Layer
from tasks.runtime.steps import StepResult

FORMAT = 3
OTHERS = 8  # compressions that one picture compares with: the labels of more would leave it no room


def code_version() -> str:
    """The version of this package."""
    return metadata.version("bivlm")


def make_report(
    base: Base,
    recipe: Recipe,
    layers: Sequence[Layer],
    shards: dict[str, StepResult],
    tables: Sequence[Table],
    packed_tables: dict[str, StepResult],
    folder: str,
    *,
    seconds: float,
    peak_memory_bytes: int,
    runner: str,
) -> dict[str, Any]:
    """Return the report on the packed checkpoint in `folder`.

    `seconds` and `peak_memory_bytes` are those of the run that wrote the checkpoint, from the calibration samples to
    the written files, libraries included, the memory that of the flow's own process; `runner` is who worked on the
    layers. A layer's seconds are those of its steps when they ran.
    """
    canonical = recipe.canonical()
    described = [_layer(layer, shards[layer.name]) for layer in layers]
    return {
        "format": FORMAT,
        "base_model": {"id": base.model.id, "revision": base.model.revision, "sha256": base.sha256},
        "licence": licence_of(base.model.folder) or None,
        "recipe": canonical,
        "recipe_sha256": digest(canonical),
        "code_version": code_version(),
        "bits": bits_of(folder),
        "relative_error": relative_error(_with_moments(described, layers)),
        "layers": described,
        "tables": [_table(table, packed_tables[table.name]) for table in tables],
        "warnings": _warnings(described, [layer.settings.get("damping") for layer in layers]),
        "seconds": seconds,
        "peak_memory_bytes": peak_memory_bytes,
        "runner": runner,
    }


def with_at_chance(report: dict[str, Any], found: Sequence[AtChance]) -> dict[str, Any]:
    """Return the report with warnings of the benchmarks on which full precision is at chance.

    They take the place of those of an earlier evaluation.
    """
    warnings = [said for said in report["warnings"] if set_of(said) is None]
    return report | {"warnings": [*warnings, *map(str, found)]}


def report_text(report: dict[str, Any]) -> str:
    """Return what `compression_report.json` holds."""
    return json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write_records(folder: str, texts: Mapping[str, str]) -> None:
    """Write the records `texts` by name beside the packed checkpoint; one that says the same already stays."""
    for name, text in texts.items():
        file, content = Path(folder) / name, text.encode()
        if not file.is_file() or file.read_bytes() != content:
            write_atomically(file, lambda stream, content=content: stream.write(content))


def earlier_report(output: str, base: Base, recipe: Recipe) -> dict[str, Any] | None:
    """The report in `output` if it is about this base model, recipe and code; else None."""
    try:
        report = read_object(Path(output) / REPORT)
    except InputError:
        return None
    expected = {"format": FORMAT, "recipe_sha256": digest(recipe.canonical()), "code_version": code_version()}
    same = all(report.get(key) == value for key, value in expected.items())
    of = report.get("base_model")
    return report if same and isinstance(of, dict) and of.get("sha256") == base.sha256 else None


def in_a_sentence(report: dict[str, Any], evaluation: dict[str, Any] | None) -> str:
    """What came of it: bits, and accuracy before and after where it was measured."""
    bits = report["bits"]
    said = (
        f"{bits['linears']['stored']:.3f} stored bits in the linears, {bits['model']['stored']:.2f} in the whole model"
    )
    if evaluation is None:
        return f"{said}; not evaluated."
    before, after = (
        fmean(figures["metrics"]["accuracy"] for figures in evaluation[role].values())
        for role in ("full_precision", "packed")
    )
    said += f"; mean accuracy {before:.1f} % before, {after:.1f} % after; KL {evaluation['kl']:.3g} nats a token, "
    return "".join([said, f"on {evaluation['measured_on']}.", *(f" {AtChance(**x)}." for x in evaluation["at_chance"])])


def page_text(
    lineage: Lineage,
    report: dict[str, Any],
    evaluation: dict[str, Any] | None,
    layers: list[dict[str, Any]],
    points: list[dict[str, Any]],
    chance: dict[str, float],
) -> str:
    """Return what `report.html` holds: the report, the lineage record and every figure on one page."""
    # The steps stay in the record: there are hundreds.
    shown = lineage.model_dump(mode="json", exclude={"format", "recipe", "layers", "steps"})
    return render(report, shown, evaluation, points, layers, chance=chance)


def points_for_figures(
    base: Base,
    recipe: Recipe,
    report: dict[str, Any],
    evaluation: dict[str, Any] | None,
    others: list[dict[str, Any]],
) -> list[dict[str, Any]]:
    """Full precision, this run and those of `others` nearest to it in stored bits, as
    `bivlm.reports.figures.compression.accuracy_against_bits` draws them."""
    if evaluation is None:
        return []

    def accuracy(role: str) -> dict[str, float]:
        return {task: figures["metrics"]["accuracy"] for task, figures in evaluation[role].items()}

    full_bits = full_precision_bits(base)["linears"]
    full = {"label": "full precision", "stored_bits": full_bits, "kl": 0.0, "this_run": False}
    this = {"label": recipe.name, "stored_bits": report["bits"]["linears"]["stored"], "kl": evaluation["kl"]}
    apart = [point for point in others if point["label"] != recipe.name]
    nearest = sorted(apart, key=lambda point: (abs(point["stored_bits"] - this["stored_bits"]), point["label"]))
    return [
        full | {"accuracy": accuracy("full_precision")},
        *(point for point in apart if point in nearest[:OTHERS]),
        this | {"this_run": True, "accuracy": accuracy("packed")},
    ]


def full_precision_bits(base: Base) -> dict[str, float]:
    """Stored bits of the base model: a weight of its linears, and a parameter of the whole model."""
    weights = sum(linear.size for linear in base.linears)
    linear_bits = sum(8 * linear.dtype.itemsize * linear.size for linear in base.linears) / weights
    return {"linears": linear_bits, "model": bits_of(base.model.folder)["model"]["stored"]}


def layers_for_figures(
    report: dict[str, Any], layers: Sequence[Layer], curves: dict[str, StepResult]
) -> list[dict[str, Any]]:
    """The report's layers with what only pictures need: mean, std, histogram, and error by p_max where it is known."""
    described = {layer["name"]: layer for layer in report["layers"]}
    return [
        {
            **described[layer.name],
            **{key: layer.statistics.record.figures[key] for key in ("mean", "std", "histogram")},
            "error_by_p_max": curves[layer.name].record.figures["error_by_p_max"] if layer.name in curves else None,
        }
        for layer in layers
    ]


def _with_moments(described: list[dict[str, Any]], layers: Sequence[Layer]) -> Iterator[dict[str, Any]]:
    """The report's layers with mean and std of their weights."""
    for known, layer in zip(described, layers, strict=True):
        yield known | {key: layer.statistics.record.figures[key] for key in ("mean", "std")}


def _warnings(layers: list[dict[str, Any]], asked: list[float | None]) -> list[str]:
    """What calibration could not do as asked, counted; a sentence each. `asked` is the damping of the recipe."""
    figures = [layer["calibration"] for layer in layers]
    unseen = [layer["name"] for layer in layers if layer["calibration"].get("tokens") == 0]
    dead = [found["dead_channels"] for found in figures if found.get("dead_channels") and found.get("tokens")]
    few = [layer for layer in layers if 0 < layer["calibration"].get("tokens", 0) < layer["shape"][1]]
    raised = [
        found["damping"]
        for found, wanted in zip(figures, asked, strict=True)
        if wanted is not None and found.get("damping", 0.0) > wanted
    ]
    said = []
    if unseen:
        said.append(f"{len(unseen)} layers saw no token and were quantized by their weights alone: {_some(unseen)}")
    if dead:
        said.append(f"{sum(dead)} input channels of {len(dead)} layers were always zero; no error was fed into them")
    if few:
        least = min(layer["calibration"]["tokens"] for layer in few)
        damping = max(layer["calibration"].get("damping", 0.0) for layer in few)
        said.append(
            f"{len(few)} layers saw fewer tokens than they have channels (the fewest {least:,}): their second moments "
            f"lack rank and rest on damping, of up to {damping:g} of the mean diagonal; more samples would help"
        )
    if raised:
        said.append(f"damping was raised in {len(raised)} layers, to {max(raised):g} at most: they had no factor")
    return said


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _table(table: Table, shard: StepResult) -> dict[str, Any]:
    return {
        "name": table.name,
        "shape": list(table.linear.shape),
        **table.settings.model_dump(mode="json"),
        "error": shard.record.figures["error"],
        "stored_bits": shard.record.figures["bits"]["stored"],
        "seconds": shard.record.seconds,
    }


def _layer(layer: Layer, shard: StepResult) -> dict[str, Any]:
    statistics, plan = layer.statistics.record, layer.plan.record
    return {
        "name": layer.name,
        "component": layer.component,
        "shape": list(layer.shape),
        "method": layer.settings["method"],
        **{"groups": None, "p_sal_nominal": None, "p_sal_actual": None} | plan.figures,
        "error": shard.record.figures["error"],
        "output_error": shard.record.figures["output_error"],
        "calibration": shard.record.figures["figures"],
        "kl_gaussian": statistics.figures["kl_gaussian"],
        "bits": shard.record.figures["bits"],
        "seconds": statistics.seconds + plan.seconds + shard.record.seconds,
    }
