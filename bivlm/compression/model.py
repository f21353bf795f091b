"""Compress a layer or a whole model in this process, without an orchestrator.

The bytes are those of `bivlm compress`, which adds what a small function cannot: calibration, block search, finishing,
evaluation, resuming, records.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError

from bivlm.checkpoint.linears import Linear, anatomy
from bivlm.checkpoint.reading import TABLES_KEY, Checkpoint
from bivlm.checkpoint.writing import Packed, check_output, write_packed_checkpoint
from bivlm.compression import layer
from bivlm.compression.budget import Choices, allocate, importance
from bivlm.compression.embeddings import chosen_tables, pack_table
from bivlm.compression.layer import LayerRecord
from bivlm.errors import InputError
from bivlm.methods import method
from bivlm.methods.base import MethodSettings
from bivlm.numerics.input_statistics import SiteStatistics
from bivlm.numerics.weight_statistics import LayerStatistics
from bivlm.recipe.loading import Recipe, load_recipe
from bivlm.recipe.pruning import PRUNING_KEY
from bivlm.recipe.selection import select
from bivlm.untrusted import first_problem


def pack_layer(
    weight: torch.Tensor,
    settings: MethodSettings | Mapping[str, Any],
    name: str = "weight",
    inputs: SiteStatistics | None = None,
) -> tuple[torch.Tensor, LayerRecord]:
    """Return the packed weight, uint8 (bytes,), and its record: error, bits per weight, bytes.

    Args:
        weight: (M, N), bfloat16, float16 or float32, on the CPU.
        settings: of a method, as under a component of a recipe.
        name: of the weight, for messages.
        inputs: statistics of what the layer takes in, for a method that needs them.

    Raises `InputError` naming what is wrong with the weight or the settings, or if the method needs inputs.

    >>> import bivlm
    >>> from bivlm.checkpoint.reading import Checkpoint
    >>> from bivlm.reference import CHECKPOINT
    >>> weight = Checkpoint.open(CHECKPOINT).read("language_model.model.layers.0.mlp.down_proj.weight")
    >>> packed, record = bivlm.pack_layer(weight, {"method": "rtn", "bits": 2, "group_size": 128})
    >>> packed.dtype, record.nbytes == packed.numel(), round(record.bits.stored, 1)
    (torch.uint8, True, 2.1)
    """
    settings = _checked(settings, name)
    chosen = method(settings.method)
    if inputs is None and "inputs" in chosen.needs(settings):
        raise InputError(f"{name}: the method {settings.method} looks at a layer's inputs; expected their statistics")
    statistics = LayerStatistics.measure(weight, chosen.tail_share(settings), name)
    return layer.pack_layer(weight, chosen.plan(statistics, settings), name, inputs)


def compress_model(model: str | Path, recipe: str | Path | Recipe, output: str | Path) -> dict[str, LayerRecord]:
    """Write the packed checkpoint to the folder `output`, and return the record of every packed weight by its name.

    One layer is in memory at a time. Evaluation, pruning sweep and gate of the recipe are left out.

    Args:
        model: the folder of a full-precision checkpoint.
        recipe: name of a shipped one, a YAML file, or one that is loaded.
        output: a new folder, or one with an earlier packed checkpoint, which is replaced.

    Raises `InputError` naming what is wrong with one of them, or a part of the recipe that needs calibration: run
    ``bivlm compress`` for that.

    >>> import bivlm, tempfile
    >>> from bivlm.reference import CHECKPOINT
    >>> with tempfile.TemporaryDirectory() as output:
    ...     records = bivlm.compress_model(CHECKPOINT, "rtn-w2g128", output)
    ...     bits = bivlm.measure_bits(output)["linears"]
    >>> len(records), round(bits["nominal"], 2), round(bits["stored"], 2)
    (76, 2.0, 2.16)
    """
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    _refuse_calibration(recipe)
    checkpoint = Checkpoint.open(model, recipe.modules)
    check_output(checkpoint, output)
    parts = anatomy(checkpoint)
    chosen, _ = select(parts.linears, recipe)
    tables = chosen_tables(parts, recipe.tables, chosen)
    settings = _settings(checkpoint, chosen, recipe)
    records: dict[str, LayerRecord] = {}

    def packed_linear(linear: Linear) -> torch.Tensor:
        weight = checkpoint.read(linear.disk_name)
        packed, records[linear.name] = pack_layer(weight, settings[linear.name], linear.name)
        return packed

    def packed_table(linear: Linear, file: Path) -> torch.Tensor:
        records[linear.name] = pack_table(checkpoint.entries[linear.disk_name], rounding[linear.name], file)
        return torch.from_numpy(np.fromfile(file, np.uint8))

    rounding = {linear.name: rounded for linear, rounded in tables}
    written = quantization_settings(recipe, list(rounding))
    with tempfile.TemporaryDirectory() as place:
        packed: dict[str, Packed] = {linear.name: partial(packed_linear, linear) for linear in chosen}
        for linear, _ in tables:
            packed[linear.name] = partial(packed_table, linear, Path(place) / "table")
        write_packed_checkpoint(checkpoint, packed, [*chosen, *(linear for linear, _ in tables)], output, written)
    return records


def quantization_settings(recipe: Recipe, embeddings: Sequence[str]) -> dict[str, Any]:
    """Return what the quantization config says beside the packed tensors.

    `embeddings` are the names of the packed embedding of tokens and head in the loaded model.
    """
    pruning = recipe.pruning.setting if recipe.pruning else None
    return {
        "code_version": metadata.version("bivlm"),
        **({PRUNING_KEY: pruning.model_dump(mode="json")} if pruning else {}),
        **({TABLES_KEY: list(embeddings)} if embeddings else {}),
    }


def _checked(settings: MethodSettings | Mapping[str, Any], name: str) -> MethodSettings:
    if isinstance(settings, MethodSettings):
        return settings
    if not isinstance(settings.get("method"), str):
        raise InputError(f"{name}: settings: expected the name of a method at 'method'")
    try:
        return method(settings["method"]).Settings.model_validate(dict(settings))
    except ValidationError as error:
        raise InputError(f"{name}: settings of {settings['method']}: {first_problem(error)}") from None


def _refuse_calibration(recipe: Recipe) -> None:
    """Raise `InputError` naming a part of the recipe that needs calibration samples."""
    parts = [
        f"components.{component}: {settings.method} looks at a layer's inputs"
        for component, settings in recipe.components.items()
        if "inputs" in method(settings.method).needs(settings)
    ]
    parts += [f"{stage}: needs calibration samples" for stage in ("search", "finish") if getattr(recipe, stage)]
    if recipe.budget is not None and recipe.budget.importance == "curvature":
        parts.append("budget.importance: curvature needs calibration samples")
    if parts:
        raise InputError(f"recipe {recipe.name}: {parts[0]}; run `bivlm compress`")


def _settings(checkpoint: Checkpoint, chosen: Sequence[Linear], recipe: Recipe) -> dict[str, MethodSettings]:
    """Return what every chosen linear is packed with: its component's settings, or what the budget gives it."""
    settings = {linear.name: recipe.components[linear.component] for linear in chosen}
    if recipe.budget is None:
        return settings
    offered = {}
    for linear in chosen:
        given = settings[linear.name]
        its_method = method(given.method)
        weight = checkpoint.read(linear.disk_name)
        statistics = LayerStatistics.measure(weight, its_method.tail_share(given), linear.name)
        cost = importance(statistics.mean, statistics.std, linear.size)
        offered[linear.name] = Choices(linear.size, cost, its_method.curve(statistics, given))
    points = allocate(offered, recipe.budget.bits, recipe.budget.least)
    return {name: _checked(point.settings, name) for name, point in points.items()}
