"""Estimate what a compression needs before any work: memory, disk and time of every stage on this machine.

Memory and disk follow from shapes and from what was measured of each method (`benchmarks.memory`); time from a probe, a
small random layer that is compressed here and now. They are estimates: memory and disk are meant to be too large by
some tens of percent, so that what is said to fit does.
"""

from __future__ import annotations

import math
import re
import shutil
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from bivlm.checkpoint.linears import Linear
from bivlm.compression.layer import pack_layer
from bivlm.errors import InputError
from bivlm.methods import method
from bivlm.methods.base import MethodSettings
from bivlm.numerics.input_statistics import SiteStatistics
from bivlm.numerics.weight_statistics import LayerStatistics

GIGA = 1e9
PROBE_SHAPE = (512, 1024)
TOKENS = 1024  # of a sample, where they are not counted: an image of some hundreds and a sentence
LIBRARIES = 0.9 * GIGA  # torch, transformers, Prefect and its temporary server, MLflow: measured, 0.85
# The most of any method that looks at inputs: bytes per weight, and second moments held at once.
_CALIBRATED_BYTES_A_WEIGHT, _MOMENTS = 28.0, 2.0
_LEFTOVER_BYTES = 24.0
_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Needs:
    """What one stage takes: bytes of memory beside the libraries', of GPU memory, bytes it leaves on disk, seconds.

    `seconds` is None where nothing was timed.
    """

    stage: str
    memory: float = 0.0
    gpu: float = 0.0
    disk: float = 0.0
    seconds: float | None = None


@dataclass(frozen=True)
class Machine:
    """The resources: bytes of memory free for this process and those it starts, and of its GPU; None without one."""

    memory: float
    gpu: float | None

    @classmethod
    def here(cls) -> Machine:
        """Return this machine, with a container's memory limit counted."""
        memory = float(psutil.virtual_memory().available)
        limit, used = (_cgroup_number(name) for name in ("memory.max", "memory.current"))
        if limit is not None:
            memory = min(memory, limit - (used or 0.0))
        gpu = float(torch.cuda.mem_get_info()[0]) if torch.cuda.is_available() else None
        return cls(memory, gpu)


@dataclass(frozen=True)
class Probe:
    """What compressing a weight with some settings takes here: stored bits and seconds of one core."""

    stored_bits: float
    seconds: float


@dataclass(frozen=True)
class Work:
    """The work to estimate.

    Attributes:
        layers: the linear layers to compress, each with its settings.
        tables: weights of packed tables, with the bits that they are rounded to.
        base_bytes: of the base checkpoint's weights.
        parameters: of the model.
        samples: for calibration; 0 where no method looks at inputs.
        finish: whether all layers are tuned together.
        leftovers: numbers beside the layers that are tuned with them.
        answers: questions that are answered, by both models together.
    """

    layers: Sequence[tuple[Linear, MethodSettings]]
    tables: Sequence[tuple[int, int]]
    base_bytes: int
    parameters: int
    samples: int = 0
    finish: bool = False
    leftovers: int = 0
    answers: int = 0


def estimate(work: Work, workers: int, probes: Mapping[str, Probe] | None = None) -> list[Needs]:
    """Return what every stage needs with `workers` layers at a time; without `probes` (see `probe`) no seconds."""
    packed = sum(_stored_bits(settings, probes) * linear.size / 8 for linear, settings in work.layers)
    tables = sum(weights * (bits + 0.6) / 8 for weights, bits in work.tables)
    changed = sum(linear.size * linear.dtype.itemsize for linear, _ in work.layers)
    changed += 2 * sum(weights for weights, _ in work.tables)
    output = packed + tables + max(work.base_bytes - changed, 0)
    stages = [_layers(work, workers, packed, probes)]
    if work.samples:
        stages.insert(0, _blocks(work))
    if work.tables:
        largest = max(weights * (bits + 0.6) / 8 for weights, bits in work.tables)
        stages.append(Needs("tables", 2 * largest + 0.3 * GIGA, disk=tables))
    if work.finish:
        # The model in float32, the gradients of the packed weights, and what is made of one layer. Of a leftover its
        # gradient, its move with a gradient and two moments, and its numbers as stored.
        tuned = 4.0 * sum(each.size for each, _ in work.layers) + _LEFTOVER_BYTES * work.leftovers
        stages.append(Needs("finishing", 4.0 * work.parameters + tuned))
    stages.append(Needs("checkpoint", 0.3 * GIGA, disk=output))
    if work.answers:
        stages.append(Needs("evaluation", 4.4 * work.parameters, gpu=2.4 * work.parameters))
    # MLflow keeps a copy of the packed checkpoint, and makes it by way of a temporary folder.
    stages.append(Needs("registration", 0.1 * GIGA, disk=2 * output))
    return stages


def check_fits(stages: Sequence[Needs], machine: Machine, folders: Iterable[Path]) -> None:
    """Raise `InputError` with figures where a stage does not fit into memory, or all of them onto a disk."""
    for each in stages:
        on_gpu, needed, there = False, LIBRARIES + each.memory, machine.memory
        if machine.gpu is not None and each.gpu > 0:
            on_gpu, needed, there = True, each.gpu, machine.gpu
        if needed > there:
            raise InputError(
                f"{each.stage}: needs about {needed / GIGA:.1f} GB of {'GPU ' * on_gpu}memory, "
                f"{there / GIGA:.1f} GB are free. "
                f"{_advice(each.stage)} --no-check tries it all the same"
            )
    disk = sum(each.disk for each in stages)
    for folder in folders:
        free = shutil.disk_usage(_existing(folder)).free
        if disk > free:
            raise InputError(
                f"{folder}: about {disk / GIGA:.1f} GB will be written, {free / GIGA:.1f} GB are free. Choose another "
                "folder, or another workspace; --no-check tries it all the same"
            )


def probe(settings: MethodSettings) -> Probe:
    """Compress a random layer with a method's settings and time it."""
    chosen = method(settings.method)
    rows, columns = PROBE_SHAPE
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator).to(torch.bfloat16)
    inputs = None
    if "inputs" in chosen.needs(settings):
        diagonal = torch.rand(columns, generator=generator) + 0.5
        squares = torch.rand(rows, columns, generator=generator) if "gradients" in chosen.needs(settings) else None
        slopes = torch.eye(rows) if "moments" in chosen.needs(settings) else None
        inputs = SiteStatistics(
            torch.diag(diagonal), torch.zeros(columns), diagonal.sqrt(), {"text": columns}, squares, slopes
        )
    started = time.perf_counter()
    statistics = LayerStatistics.measure(weight, chosen.tail_share(settings))
    _, record = pack_layer(weight, chosen.plan(statistics, settings), inputs=inputs)
    return Probe(record.bits.stored, time.perf_counter() - started)


def layer_bytes(shape: tuple[int, int], settings: MethodSettings) -> float:
    """Return one layer's peak bytes for statistics, plan and packing, as in `python -m benchmarks.memory --methods`."""
    chosen = method(settings.method)
    if "inputs" not in chosen.needs(settings):
        return chosen.bytes_a_weight * math.prod(shape)
    # Where errors are fed back in a fixed order: the moment, its factor, and the shares made of it.
    held = 4.0 * (3.0 if chosen.feeds_back(settings) else _MOMENTS)
    sides = shape if "moments" in chosen.needs(settings) else shape[1:]
    return _CALIBRATED_BYTES_A_WEIGHT * math.prod(shape) + held * sum(channels**2 for channels in sides)


def _layers(work: Work, workers: int, packed: float, probes: Mapping[str, Probe] | None) -> Needs:
    memory, seconds = 0.0, 0.0
    size = math.prod(PROBE_SHAPE)
    for linear, settings in work.layers:
        chosen = method(settings.method)
        calibrated = "inputs" in chosen.needs(settings)
        memory = max(memory, layer_bytes(linear.shape, settings))
        if probes is not None:
            wider = linear.shape[1] / PROBE_SHAPE[1]  # factors and products of moments take so much longer per weight
            scale = (1 + max(wider, 1.0)) / 2 if calibrated else 1.0
            seconds += probes[_key(settings)].seconds * linear.size / size * scale
    # Statistics hold the salient weights with their places; of a 16-bit layer some hundred kilobytes beside.
    disk = packed + len(work.layers) * 1e6 + 0.1 * sum(linear.size for linear, _ in work.layers)
    side_by_side = min(workers, len(work.layers))
    return Needs("layers", side_by_side * memory, disk=disk, seconds=seconds / side_by_side if probes else None)


def _blocks(work: Work) -> Needs:
    """Return what calibration by block needs: a block, its statistics and activations; outputs stay on disk."""
    weights: dict[str, float] = defaultdict(float)
    moments: dict[str, dict[str, float]] = defaultdict(dict)
    hidden: dict[str, int] = {}
    for linear, settings in work.layers:
        block, name = _block_of(linear.name)
        weights[block] += 4.0 * linear.size  # float32 on the CPU
        moments[block][_SITES.get(name, name)] = 4.0 * linear.shape[1] ** 2
        if "moments" in method(settings.method).needs(settings):
            moments[block][f"{name}'s outputs"] = 4.0 * linear.shape[0] ** 2
        hidden[block] = max(hidden.get(block, 0), min(linear.shape))
    memory = max(weights[block] + sum(moments[block].values()) for block in weights)
    statistics = sum(number for sites in moments.values() for number in sites.values())
    outputs = sum(4.0 * width * work.samples * TOKENS for width in hidden.values())
    return Needs("block inputs", 2 * memory + 0.3 * GIGA, gpu=2 * memory, disk=statistics + outputs)


# Layers that read the same tensor.
_SITES = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "mlp", "up_proj": "mlp"}


def _block_of(name: str) -> tuple[str, str]:
    """Return the block that a layer is part of, and the layer's own name."""
    found = re.match(r"(.*?\.\d+)\.", name)
    return (found.group(1) if found else name), name.rpartition(".")[2]


def _stored_bits(settings: MethodSettings, probes: Mapping[str, Probe] | None) -> float:
    return probes[_key(settings)].stored_bits if probes is not None else 4.5


def _key(settings: MethodSettings) -> str:
    return settings.model_dump_json()


def probe_all(layers: Iterable[tuple[Linear, MethodSettings]]) -> dict[str, Probe]:
    """Return a `Probe` for all distinct settings, for `estimate`."""
    return {key: probe(settings) for key, settings in {_key(settings): settings for _, settings in layers}.items()}


def _advice(stage: str) -> str:
    return {
        "layers": "Fewer workers need less (--workers 1).",
        "block inputs": "A method that looks at weights alone needs less.",
        "finishing": "Leave 'finish' out of the recipe, or use a machine with a larger memory.",
        "evaluation": "Leave it out (--no-evaluate) and evaluate elsewhere, with bivlm evaluate.",
    }.get(stage, "Free some, or use another machine.")


def _existing(folder: Path) -> Path:
    return next(place for place in (folder, *folder.parents) if place.exists())


def _cgroup_number(name: str) -> float | None:
    """Return a number of this container's limits; None where there is none."""
    try:
        return float((_CGROUP / name).read_text())
    except (OSError, ValueError):  # no such file, or "max"
        return None
