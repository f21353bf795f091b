"""Statistics of every layer's weights, from which plans are made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import task

from bivlm import statistics
from bivlm.checkpoint import Checkpoint
from bivlm.identity import step_key
from bivlm.statistics import LayerStatistics
from tasks.layers import Layer
from tasks.policy import OVER_NETWORK
from tasks.progress import advance
from tasks.steps import Done, do_step, open_workspace

STAGE = "statistics"
FILE = "statistics.safetensors"


@task(name="statistics", task_run_name="statistics-{chunk[0].name}", **OVER_NETWORK)
def measure_layers(chunk: list[Layer], workspace: str) -> dict[str, Done]:
    """The statistics of a chunk of layers, one weight in memory at a time; steps by layer name."""
    store = open_workspace(workspace)
    checkpoint = Checkpoint.open(chunk[0].folder)
    done = {}
    for layer in chunk:
        tail_share = layer.method.tail_share(layer.method_settings)
        key = step_key(
            STAGE,
            statistics.VERSION,
            {"checkpoint": layer.checkpoint, "tensor": layer.disk_name},
            {"tail_share": tail_share},
            exact=True,
        )

        def measure(folder: Path, layer: Layer = layer, tail_share: float = tail_share) -> dict[str, Any]:
            measured = LayerStatistics.measure(checkpoint.read(layer.disk_name), tail_share, layer.name)
            measured.save(folder / FILE)
            return measured.summary()

        done[layer.name] = do_step(store, STAGE, key, measure)
        advance(STAGE)
    return done
