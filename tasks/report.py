"""compression_report.json: what was compressed, how, and what it costs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from bivlm.bits import bits_of
from bivlm.identity import digest
from bivlm.recipe import Recipe
from bivlm.stores.folder import write_atomically
from tasks.checkpoint import Base
from tasks.layers import Layer
from tasks.steps import Done

FILE = "compression_report.json"
FORMAT = 1


def code_version() -> str:
    """The version of this package."""
    return metadata.version("bivlm")


def write_report(
    base: Base,
    recipe: Recipe,
    layers: Sequence[Layer],
    shards: dict[str, Done],
    output: str,
    *,
    seconds: float,
    peak_memory_bytes: int,
) -> dict[str, Any]:
    """Write the report beside the packed checkpoint in `output` and return it.

    `seconds` and `peak_memory_bytes` are those of the run that wrote the checkpoint, from the calibration samples to
    the written files, libraries included; a layer's seconds are those of its steps when they ran.
    """
    canonical = recipe.canonical()
    report = {
        "format": FORMAT,
        "base_model": {"id": base.model.id, "revision": base.model.revision, "sha256": base.sha256},
        "recipe": canonical,
        "recipe_sha256": digest(canonical),
        "code_version": code_version(),
        "bits": bits_of(output),
        "layers": [_layer(layer, shards[layer.name]) for layer in layers],
        "seconds": seconds,
        "peak_memory_bytes": peak_memory_bytes,
    }
    content = json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_atomically(Path(output) / FILE, lambda file: file.write(content.encode()))
    return report


def earlier_report(output: str, base: Base, recipe: Recipe) -> dict[str, Any] | None:
    """The report in `output` if it is about this base model, recipe and code; else None."""
    try:
        report = json.loads((Path(output) / FILE).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    expected = {"format": FORMAT, "recipe_sha256": digest(recipe.canonical()), "code_version": code_version()}
    same = isinstance(report, dict) and all(report.get(key) == value for key, value in expected.items())
    return report if same and report.get("base_model", {}).get("sha256") == base.sha256 else None


def _layer(layer: Layer, shard: Done) -> dict[str, Any]:
    statistics, plan = layer.statistics.record, layer.plan.record
    return {
        "name": layer.name,
        "component": layer.component,
        "shape": list(layer.shape),
        "method": layer.settings["method"],
        **{"groups": None, "p_sal_nominal": None, "p_sal_actual": None} | plan.figures,
        "error": shard.record.figures["error"],
        "kl_gaussian": statistics.figures["kl_gaussian"],
        "bits": shard.record.figures["bits"],
        "seconds": statistics.seconds + plan.seconds + shard.record.seconds,
    }
