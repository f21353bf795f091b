"""Statistics of every layer's weights, from which plans are made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import task

from bivlm.numerics import weight_statistics as statistics
from bivlm.numerics.weight_statistics import LayerStatistics
from bivlm.workspace.hashing import step_identity
from tasks.layers import Layer, do_layers, open_base
from tasks.runtime.policy import OVER_NETWORK
from tasks.runtime.steps import StepResult

STAGE = "statistics"
FILE = "statistics.safetensors"


@task(name="statistics", task_run_name="statistics-{chunk[0].name}", **OVER_NETWORK)
def measure_layers(chunk: list[Layer], workspace: str) -> dict[str, StepResult]:
    """The statistics of a chunk of layers, one weight in memory at a time; steps by layer name."""
    checkpoint = open_base(chunk)

    def identity(layer: Layer) -> dict[str, Any]:
        inputs = {"weight": layer.weight_sha256}
        return step_identity(STAGE, statistics.VERSION, inputs, {"tail_share": _tail_share(layer)}, exact=True)

    def measure(layer: Layer, folder: Path) -> dict[str, Any]:
        measured = LayerStatistics.measure(
            checkpoint.read(layer.disk_name, layer.weight_sha256), _tail_share(layer), layer.name
        )
        measured.save(folder / FILE)
        return measured.summary()

    return do_layers(chunk, workspace, identity, measure)


def _tail_share(layer: Layer) -> float:
    return layer.method.tail_share(layer.method_settings)
