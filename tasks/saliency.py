"""Statistics of every layer's weights, from which plans are made."""

from __future__ import annotations

from pathlib import Path

from prefect import task

from bivlm.numerics import weight_statistics
from bivlm.numerics.weight_statistics import LayerStatistics
from bivlm.workspace.hashing import step_identity
from tasks.layers import STATISTICS_FILE, Layer, Sources, do_layers
from tasks.runtime.policy import OVER_NETWORK
from tasks.runtime.steps import Figures, Identity, StepResult

STAGE = "statistics"


@task(name="statistics", task_run_name="statistics-{chunk[0].name}", **OVER_NETWORK)
def measure_layers(chunk: list[Layer], workspace: str) -> dict[str, StepResult]:
    """Measure the weights of a chunk of layers, one in memory at a time; steps by layer name."""
    return do_layers(chunk, workspace, _identify, _measure)


def _identify(layer: Layer) -> Identity:
    inputs = {"weight": layer.weight_sha256}
    return step_identity(STAGE, weight_statistics.VERSION, inputs, {"tail_share": _tail_share(layer)}, exact=True)


def _measure(layer: Layer, sources: Sources, folder: Path) -> Figures:
    measured = LayerStatistics.measure(layer.read_weight(sources.base), _tail_share(layer), layer.name)
    measured.save(folder / STATISTICS_FILE)
    return measured.summary()


def _tail_share(layer: Layer) -> float:
    return layer.method.tail_share(layer.method_settings)
