"""What Prefect adds to the work: the layer stages as the flow runs them, and the same functions without Prefect.

``python -m benchmarks.orchestration [--layers 112] [--width 2048] [--repeats 3]``; law 9 allows 10 percent. The server
is warm: a flow has run before anything is timed. Every run has a workspace of its own, so that nothing is reused. The
flow runs as `bivlm compress` runs it, on a temporary server and without heartbeats; what these add at the end of a run
on a lasting server, whatever its length, is printed on a line of its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from flows.cli.quiet import quieten

quieten()

import torch  # noqa: E402
from prefect import flow  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from bivlm.checkpoint.reading import Checkpoint  # noqa: E402
from bivlm.recipe.loading import load_recipe  # noqa: E402
from flows.cli.local_server import temporary_server  # noqa: E402
from flows.layers import pack_all  # noqa: E402
from flows.runners import WORKERS, Runner, started  # noqa: E402
from tasks import binarization, grouping, saliency  # noqa: E402
from tasks.layers import Layer, in_chunks  # noqa: E402


def make_layers(folder: Path, count: int, width: int) -> list[Layer]:
    """A checkpoint of `count` random bf16 weights of width x width, as layers of the language component."""
    generator = torch.Generator().manual_seed(0)
    weights = {
        f"layers.{i}.weight": torch.randn(width, width, generator=generator).to(torch.bfloat16) for i in range(count)
    }
    folder.mkdir()
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "llava"}))
    checkpoint = Checkpoint.open(folder)
    settings = load_recipe("bivlm").canonical()["components"]["language"]
    names = [name.removesuffix(".weight") for name in checkpoint.entries]
    digests = checkpoint.digests().tensors
    return [
        Layer(str(folder), name, f"{name}.weight", "language", (width, width), digests[f"{name}.weight"], settings)
        for name in names
    ]


def without_prefect(layers: Sequence[Layer], workspace: str) -> None:
    """The stages on a thread pool of the same size, in the same chunks."""
    with ThreadPoolExecutor(WORKERS) as pool:

        def stage(work: Callable[..., dict], layers: Sequence[Layer]) -> dict:
            done = pool.map(lambda chunk: work(chunk, workspace), in_chunks(layers, WORKERS))
            return {name: step for chunk in done for name, step in chunk.items()}

        measured = stage(saliency.measure_layers.fn, layers)
        layers = [replace(layer, statistics=measured[layer.name]) for layer in layers]
        planned = stage(grouping.plan_layers.fn, layers)
        stage(binarization.pack_layers.fn, [replace(layer, plan=planned[layer.name]) for layer in layers])


@flow(persist_result=False, validate_parameters=False)
def with_prefect(layers: Sequence[Layer], workspace: str) -> None:
    """The stages as `flows.layers` runs them."""
    with started(Runner()) as workers:
        pack_all(layers, workspace, lambda: None, workers)


@flow(persist_result=False)
def empty() -> None:
    """A flow without work."""


def seconds_of(work: Callable[[], object]) -> float:
    """Wall time of one call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main(arguments: Sequence[str] | None = None) -> int:
    """Print both times and the overhead; returns 1 if it is 10 percent or more."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.orchestration", description=__doc__.partition("\n")[0])
    parser.add_argument("--layers", type=int, default=112)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args(arguments)
    seconds: dict[str, list[float]] = {"without Prefect": [], "with Prefect": []}
    with tempfile.TemporaryDirectory() as place:
        layers = make_layers(Path(place) / "model", options.layers, options.width)
        with temporary_server():
            with_prefect(layers[:2], str(Path(place) / "warm"))
            for repeat in range(options.repeats):
                for name, run in (("without Prefect", without_prefect), ("with Prefect", with_prefect)):
                    workspace = str(Path(place) / f"{name} {repeat}")
                    seconds[name].append(seconds_of(lambda run=run, workspace=workspace: run(layers, workspace)))
            empty_flow = statistics.median(seconds_of(empty) for _ in range(options.repeats))
        heartbeats = statistics.median(seconds_of(empty) for _ in range(options.repeats)) - empty_flow
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    overhead = medians["with Prefect"] / medians["without Prefect"] - 1
    for name, times in seconds.items():
        print(f"{name:<16} {medians[name]:7.2f} s  ({', '.join(f'{t:.2f}' for t in times)})")
    chunks = len(in_chunks(layers, WORKERS))
    print(f"overhead         {overhead:7.1%}    ({options.layers} layers in {chunks} chunks a stage)")
    print(f"an empty flow    {empty_flow:7.2f} s  and {heartbeats:.2f} s more where heartbeats are sent")
    return 0 if overhead < 0.10 else 1


if __name__ == "__main__":
    sys.exit(main())
