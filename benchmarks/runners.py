"""The layer stages by every runner that is installed, as ratios to threads; and what travels to a worker.

``python -m benchmarks.runners [--layers 24] [--width 2048] [--workers N]``. Every run has a workspace of
its own, so that nothing is reused, and its bytes are compared with those of the threads. The start of a runner, which
is mostly that of importing torch in every worker, is printed on its own.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

from flows.cli.quiet import quieten

quieten()

import cloudpickle  # noqa: E402
from prefect import flow  # noqa: E402

from benchmarks.orchestration import make_layers  # noqa: E402
from bivlm.workspace.steps import Workspace  # noqa: E402
from flows.cli.local_server import temporary_server  # noqa: E402
from flows.layers import PackedLayers, pack_all  # noqa: E402
from flows.runners import WORKERS, Runner, started  # noqa: E402
from tasks import binarization  # noqa: E402
from tasks.layers import Layer, in_chunks  # noqa: E402

INSTALLED_BY = {"threads": "prefect", "processes": "prefect", "dask": "prefect_dask", "ray": "prefect_ray"}
# The linear layers of a Qwen2.5-VL 7B: how many there are of each, and of what shape.
SEVEN_B = {
    "model.language_model.layers.{}.self_attn.q_proj": (28, (3584, 3584)),
    "model.language_model.layers.{}.self_attn.k_proj": (28, (512, 3584)),
    "model.language_model.layers.{}.self_attn.v_proj": (28, (512, 3584)),
    "model.language_model.layers.{}.self_attn.o_proj": (28, (3584, 3584)),
    "model.language_model.layers.{}.mlp.gate_proj": (28, (18944, 3584)),
    "model.language_model.layers.{}.mlp.up_proj": (28, (18944, 3584)),
    "model.language_model.layers.{}.mlp.down_proj": (28, (3584, 18944)),
    "model.visual.blocks.{}.attn.qkv": (32, (3840, 1280)),
    "model.visual.blocks.{}.attn.proj": (32, (1280, 1280)),
    "model.visual.blocks.{}.mlp.gate_proj": (32, (3420, 1280)),
    "model.visual.blocks.{}.mlp.up_proj": (32, (3420, 1280)),
    "model.visual.blocks.{}.mlp.down_proj": (32, (1280, 3420)),
}


@dataclass(frozen=True)
class Timed:
    """Seconds until a first few layers were done, seconds for all layers from then on, and what came of it."""

    start: float
    work: float
    done: PackedLayers

    def shards(self) -> dict[str, str]:
        """The sha256 of every packed weight."""
        return {name: step.record.outputs[binarization.FILE].sha256 for name, step in self.done.shards.items()}


@flow(persist_result=False, validate_parameters=False)
def run(layers: Sequence[Layer], place: Path, runner: Runner) -> Timed:
    """The stages as `flows.layers` runs them."""
    begun = time.perf_counter()
    with started(runner) as workers:
        pack_all(layers[: workers.count], Workspace.open(place / "first").url, lambda: None, workers)
        ready = time.perf_counter()
        done = pack_all(layers, Workspace.open(place / "all").url, lambda: None, workers)
        return Timed(ready - begun, time.perf_counter() - ready, done)


def seven_b(example: Layer) -> list[Layer]:
    """The layers of a 7B model as they are sent out to be packed, each with records such as `example` has."""
    return [
        replace(copy.deepcopy(example), name=name, disk_name=f"{name}.weight", shape=shape)
        for pattern, (count, shape) in SEVEN_B.items()
        for name in map(pattern.format, range(count))
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a row a runner; returns 1 if one ends with other bytes than the threads."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.runners", description=__doc__.partition("\n")[0])
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--workers", type=int, default=WORKERS)
    options = parser.parse_args(arguments)
    names = [name for name, package in INSTALLED_BY.items() if find_spec(package)]
    timed: dict[str, Timed] = {}
    with tempfile.TemporaryDirectory() as folder, temporary_server():
        layers = make_layers(Path(folder) / "model", options.layers, options.width)
        for name in names:
            runner = Runner(name, workers=options.workers)
            timed[name] = run(layers, Path(folder) / name, runner)
    threads = timed["threads"]
    print(f"{options.layers} layers of {options.width} x {options.width}, {options.workers} workers")
    for name, each in timed.items():
        ratio = f"{each.work / threads.work:5.2f} x threads"
        print(f"{name:<10} {each.work:7.2f} s  {ratio}  after {each.start:6.2f} s until the first layers were done")
    same = all(each.shards() == threads.shards() for each in timed.values())
    print(f"bytes      {'the same' if same else 'DIFFER'}")
    sizes = [len(cloudpickle.dumps(chunk)) for chunk in in_chunks(seven_b(threads.done.layers[0]), options.workers)]
    mean, largest = sum(sizes) / len(sizes) / 1e3, max(sizes) / 1e3
    print(f"a 7B model is sent out in {len(sizes)} chunks a stage, of {mean:.0f} kB on average, {largest:.0f} at most")
    return int(not same)


if __name__ == "__main__":
    sys.exit(main())
