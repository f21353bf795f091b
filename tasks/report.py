"""compression_report.json and report.html: what was compressed, how, and what it costs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
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
from bivlm.reports.report_page import Drawn, render
from bivlm.untrusted import read_object
from bivlm.workspace.hashing import digest
from bivlm.workspace.stores.folder import write_atomically
from tasks.checkpoint import Base
from tasks.compressed import CompressedModel
from tasks.embeddings import Embedding
from tasks.layers import Layer
from tasks.runtime.steps import Figures, StepResult

FORMAT = 3
OTHERS = 8  # compressions that one figure compares with: the labels of more would leave it no room

Report = dict[str, Any]  # what compression_report.json holds


def code_version() -> str:
    """Return the version of this package."""
    return metadata.version("bivlm")


def make_report(model: CompressedModel, *, seconds: float, peak_memory_bytes: int, runner: str) -> Report:
    """Return the report on the packed checkpoint.

    `seconds` and `peak_memory_bytes` are those of the run that wrote the checkpoint, from the calibration samples to
    the written files, libraries included; the memory is that of the flow's own process. `runner` says who worked on
    the layers. A layer's seconds are those of its steps when they ran.
    """
    base, layers, canonical = model.base, model.layers, model.recipe.canonical()
    described = [_describe_layer(layer, model.shards[layer.name]) for layer in layers]
    return {
        "format": FORMAT,
        "base_model": {"id": base.model.id, "revision": base.model.revision, "sha256": base.sha256},
        "licence": licence_of(base.model.folder) or None,
        "recipe": canonical,
        "recipe_sha256": digest(canonical),
        "code_version": code_version(),
        "bits": bits_of(model.checkpoint.folder),
        "relative_error": relative_error(_with_figures(described, layers, "mean", "std")),
        "layers": described,
        "tables": [_describe_embedding(embedding, shard) for embedding, shard in model.embeddings],
        **_leftovers(model),
        "warnings": _warnings(described, [layer.settings.get("damping") for layer in layers]),
        "seconds": seconds,
        "peak_memory_bytes": peak_memory_bytes,
        "runner": runner,
    }


def with_at_chance(report: Report, found: Sequence[AtChance]) -> Report:
    """Return the report with warnings of the benchmarks on which full precision is at chance.

    They take the place of those of an earlier evaluation.
    """
    warnings = [said for said in report["warnings"] if set_of(said) is None]
    return report | {"warnings": [*warnings, *map(str, found)]}


def report_text(report: Report) -> str:
    """Return what `compression_report.json` holds."""
    return json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write_records(folder: str, texts: Mapping[str, str]) -> None:
    """Write the records `texts` by name beside the packed checkpoint; one that says the same already stays."""
    for name, text in texts.items():
        file, content = Path(folder) / name, text.encode()
        if not file.is_file() or file.read_bytes() != content:
            write_atomically(file, lambda stream, content=content: stream.write(content))


def earlier_report(output: str, base: Base, recipe: Recipe) -> Report | None:
    """Return the report in `output` if it is about this base model, recipe and code; else None."""
    try:
        report = read_object(Path(output) / REPORT)
    except InputError:
        return None
    expected = {"format": FORMAT, "recipe_sha256": digest(recipe.canonical()), "code_version": code_version()}
    same = all(report.get(key) == value for key, value in expected.items())
    of = report.get("base_model")
    return report if same and isinstance(of, dict) and of.get("sha256") == base.sha256 else None


def summarize(report: Report, evaluation: Figures | None) -> str:
    """Return bits, and accuracy before and after where it was measured, as a sentence."""
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
    said += f"; mean accuracy {before:.1f} % before, {after:.1f} % after; KL {evaluation['kl']:.3g} nats per token, "
    return "".join([said, f"on {evaluation['measured_on']}.", *(f" {AtChance(**x)}." for x in evaluation["at_chance"])])


def page_text(
    lineage: Lineage,
    report: Report,
    evaluation: Figures | None,
    layers: list[Figures],
    drawn: list[Drawn],
    chance: dict[str, float],
) -> str:
    """Return what `report.html` holds: the report, the lineage record and every figure on one page."""
    # The steps stay in the record: there are hundreds.
    shown = lineage.model_dump(mode="json", exclude={"format", "recipe", "layers", "steps"})
    return render(report, shown, evaluation, drawn, layers, chance=chance)


def points_for_figures(
    base: Base, recipe: Recipe, report: Report, evaluation: Figures | None, others: list[Figures]
) -> list[Figures]:
    """Return full precision, this run and those of `others` nearest to it in stored bits, as
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
    """Return the stored bits of the base model: of a weight of its linears, and of a parameter of the whole model."""
    weights = sum(linear.size for linear in base.linears)
    linear_bits = sum(8 * linear.dtype.itemsize * linear.size for linear in base.linears) / weights
    return {"linears": linear_bits, "model": bits_of(base.model.folder)["model"]["stored"]}


def layers_for_figures(report: Report, layers: Sequence[Layer], curves: Mapping[str, StepResult]) -> list[Figures]:
    """Return the report's layers with what figures need: mean, std, histogram, and error by p_max where it is known."""
    by_name = {layer["name"]: layer for layer in report["layers"]}
    described = _with_figures([by_name[layer.name] for layer in layers], layers, "mean", "std", "histogram")
    errors = {name: curve.record.figures["error_by_p_max"] for name, curve in curves.items()}
    return [layer | {"error_by_p_max": errors.get(layer["name"])} for layer in described]


def _with_figures(described: Sequence[Figures], layers: Sequence[Layer], *keys: str) -> list[Figures]:
    """Return the descriptions with some figures of the weights' statistics."""
    return [
        known | {key: layer.statistics.record.figures[key] for key in keys}
        for known, layer in zip(described, layers, strict=True)
    ]


def _leftovers(model: CompressedModel) -> Figures:
    """Return a sentence on tuned leftovers, for the report; nothing if there are none."""
    figures = model.tuned.record.figures if model.tuned is not None else {}
    if "leftovers" not in figures:
        return {}
    count, before, after = len(figures["leftovers"]), figures["kl_before"], figures["kl_after"]
    said = (
        f"{count} tensors that are not packed (norms, biases, embedding, head) were tuned with the packed ones; they "
        f"take no more bits. On samples not tuned on, KL went from {before:.3g} to {after:.3g} nats per token"
    )
    return {"leftovers": said}


def _warnings(layers: list[Figures], asked: list[float | None]) -> list[str]:
    """Return what calibration could not do as requested, counted, a sentence each; `asked` is the recipe's damping."""
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


def _describe_embedding(embedding: Embedding, shard: StepResult) -> Figures:
    return {
        "name": embedding.name,
        "shape": list(embedding.linear.shape),
        **embedding.settings.model_dump(mode="json"),
        "error": shard.record.figures["error"],
        "stored_bits": shard.record.figures["bits"]["stored"],
        "seconds": shard.record.seconds,
    }


def _describe_layer(layer: Layer, shard: StepResult) -> Figures:
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
