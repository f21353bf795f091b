"""Run the calibration samples through the model, one block in memory at a time.

One step per block: its outputs for all samples, which the next block takes in, and the input statistics of its linear
layers. A killed chain of blocks resumes at its block. Statistics are workspace files; for a large model they are tens
of gigabytes, and those of no two blocks are held together.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from prefect import task
from safetensors.torch import save_file

from bivlm.calibration.blocks.encoded import SampleTensors, stack, with_reply, write_samples
from bivlm.calibration.blocks.gradients import gradient_weights, token_gradients
from bivlm.calibration.blocks.model import BlockwiseModel
from bivlm.calibration.blocks.run import image_tokens, run_unit
from bivlm.calibration.blocks.sites import Weigh, by_modality, names_of, uniform
from bivlm.calibration.blocks.units import Unit
from bivlm.calibration.frozen import load_samples
from bivlm.checkpoint.architectures import MODULES_KEY
from bivlm.evaluation.generation import load_processor
from bivlm.packing import unpack
from bivlm.recipe.loading import CalibrationSettings, TokenWeights
from bivlm.sources.replies import read_reply
from bivlm.workspace.hashing import step_identity
from bivlm.workspace.steps import Reference, Workspace
from tasks import binarization
from tasks.checkpoint import Base
from tasks.runtime.device import Device, HeldModel, gpu_slot
from tasks.runtime.policy import OVER_NETWORK
from tasks.runtime.progress import advance
from tasks.runtime.steps import Figures, Identity, StepResult, do_step, open_workspace

STAGE = "block inputs"
SAMPLES_STAGE = "model inputs"
GRADIENTS_STAGE = "token gradients"
VERSION = 2
SAMPLES_FILE = "samples.safetensors"
OUTPUT_FILE = "output.safetensors"


@dataclass(frozen=True)
class Calibration:
    """The samples as the model takes them in, how they are weighed, and where blocks run."""

    base: Base
    settings: CalibrationSettings
    samples: StepResult
    device: Device
    workspace: str

    @property
    def _samples(self) -> Reference:
        return self.samples.record.outputs[SAMPLES_FILE]

    def open_samples(self, store: Workspace) -> SampleTensors:
        """Return the samples' tensors."""
        return SampleTensors(store.fetch(self._samples))

    def identity(self, stage: str, inputs: Mapping[str, Any], recipe_part: Any) -> Identity:
        """Return the identity of a step that runs parts of the model on the samples."""
        both = {"checkpoint": self.base.sha256, "samples": self._samples.sha256, **inputs}
        if self.base.modules:
            both[MODULES_KEY] = self.base.modules
        return step_identity(stage, VERSION, both, recipe_part, exact=False, device=self.device.kind)


@task(name="model-inputs", **OVER_NETWORK)
def encode_samples(
    base: Base, settings: CalibrationSettings, frozen: StepResult, device: Device, workspace: str
) -> Calibration:
    """Encode images and text as the model takes them in, one set of tensors per sample."""
    store = open_workspace(workspace)
    inputs = {"checkpoint": base.sha256, "samples": frozen.record.figures["sha256"]}
    identity = step_identity(SAMPLES_STAGE, VERSION, inputs, None, exact=False)

    def encode(place: Path) -> Figures:
        folder = str(base.model.folder)
        with store.scratch() as samples_folder:
            samples = load_samples(store.fetch_folder(frozen.record.outputs, samples_folder))
            processor = load_processor(folder)
            with held_model(base, device) as model:
                encoded = [with_reply(read_reply(model, processor, sample)) for sample in samples]
        write_samples(encoded, place / SAMPLES_FILE)
        return {"samples": len(encoded)}

    return Calibration(base, settings, do_step(store, identity, encode), device, workspace)


def blocks_of(calibration: Calibration) -> tuple[list[Unit], Unit | None]:
    """Return the model's units in the order in which they run, and apart from them the head, if it is one."""
    with held_model(calibration.base, calibration.device) as model:
        head = next((unit for unit in model.units if unit.name == model.head_name), None)
        return [unit for unit in model.units if unit is not head], head


def up_to(units: Sequence[Unit], linears: Collection[str]) -> list[Unit]:
    """Return the units up to the last one that holds any of `linears`."""
    wanted = [index for index, unit in enumerate(units) if set(linears) & set(unit.linears)]
    return list(units[: max(wanted, default=-1) + 1])


@task(name="block", task_run_name="block-{unit.name}", **OVER_NETWORK)
def run_block(
    calibration: Calibration,
    unit: Unit,
    before: dict[str, StepResult],
    *,
    observe: bool = False,
    gradients: StepResult | None = None,
    packed: dict[str, StepResult] | None = None,
) -> StepResult:
    """Run one unit on all samples, given the steps of those `before` it by name.

    With `observe` also the input statistics: ``figures["sites"]`` has the file and the token counts of every site,
    ``figures["site_of"]`` the site of every linear layer; `gradients` is the step of `measure_gradients`, for token
    weights that need it. With `packed`, the shards of the unit's layers, it computes with what they rebuild.
    """
    weights = calibration.settings.tokens if observe else None
    store = open_workspace(calibration.workspace)
    with held_model(calibration.base, calibration.device) as model:
        given = {other.name: before[other.name].record.outputs[OUTPUT_FILE] for other in model.predecessors(unit)}
    shards = {name: done.record.outputs[binarization.FILE] for name, done in (packed or {}).items()}
    norms = None
    if observe and weights.weights == "gradient":
        norms = gradients.record.outputs.get(_norms_file(unit.name))
    identity = calibration.identity(
        STAGE,
        {
            "before": {name: reference.sha256 for name, reference in given.items()},
            "packed": {name: reference.sha256 for name, reference in shards.items()},
            "gradients": norms.sha256 if norms else None,
        },
        {"unit": unit.name, "tokens": _relevant(weights)},
    )

    def run(place: Path) -> Figures:
        with gpu_slot(calibration.device), held_model(calibration.base, calibration.device) as model:
            samples = calibration.open_samples(store)
            outcome = run_unit(
                model,
                unit,
                samples,
                {name: SampleTensors(store.fetch(reference)) for name, reference in given.items()},
                weigh=_weigher(model, unit, samples, weights, norms, store),
                weights={name: _rebuilt(store.fetch(reference), name) for name, reference in shards.items()},
            )
        write_samples(stack(outcome.outputs), place / OUTPUT_FILE)
        files = names_of(list(outcome.sites))
        for site, statistics in outcome.sites.items():
            statistics.save(place / files[site])
        sites = {site: {"file": files[site], "tokens": found.tokens} for site, found in outcome.sites.items()}
        return {"sites": sites, "site_of": outcome.site_of}

    done = do_step(store, identity, run)
    if observe:
        advance(STAGE)
    return done


@task(name="token-gradients", **OVER_NETWORK)
def measure_gradients(
    calibration: Calibration, blocks: dict[str, StepResult], *, squares: bool, moments: bool, traces: bool
) -> StepResult:
    """Measure how much every token matters at every site, from the steps of all blocks, see `token_gradients`.

    With `squares` or `moments` also files of each unit's, named by ``figures["squares"]`` and ``figures["moments"]``
    for each linear layer; ``figures["curvature"]`` has the sums of squares, and with `traces` ``figures["traces"]``
    the traces of moments. Both balance samples with and without an image.
    """
    store = open_workspace(calibration.workspace)
    outputs = {name: done.record.outputs[OUTPUT_FILE] for name, done in blocks.items()}
    inputs = {"blocks": {name: reference.sha256 for name, reference in outputs.items()}}
    part = {"squares": squares, "moments": moments, "traces": traces}
    identity = calibration.identity(GRADIENTS_STAGE, inputs, part)

    def run(place: Path) -> Figures:
        figures: Figures = {"squares": {}, "moments": {}, "curvature": {}, "traces": {}}
        with gpu_slot(calibration.device), held_model(calibration.base, calibration.device) as model:
            opened = {name: SampleTensors(store.fetch(reference)) for name, reference in outputs.items()}
            samples = calibration.open_samples(store)
            wanted = {"squares": squares, "moments": moments, "balanced": moments or traces}
            for found in token_gradients(model, samples, opened, **wanted):
                if any(found.norms):
                    write_samples(found.norms, place / _norms_file(found.unit))
                for kind, tensors in (("squares", found.squares), ("moments", found.moments)):
                    if tensors:
                        file = f"{found.unit}.{kind}.safetensors"
                        save_file(tensors, place / file)
                        figures[kind] |= dict.fromkeys(tensors, file)
                sums = {name: float(each.sum(dtype=torch.float64)) for name, each in found.squares.items()}
                figures["curvature"] |= sums
                if traces:
                    figures["traces"] |= found.traces
        return figures

    return do_step(store, identity, run)


def _norms_file(unit: str) -> str:
    return f"{unit}.safetensors"


def _relevant(weights: TokenWeights | None) -> Figures | None:
    """Return the part of the token weights that the statistics depend on."""
    if weights is None:
        return None
    further = {"modality": {"image"}, "gradient": {"shrink"}}.get(weights.weights, set())
    return weights.model_dump(mode="json", include={"weights"} | further)


def _weigher(
    model: BlockwiseModel,
    unit: Unit,
    samples: SampleTensors,
    weights: TokenWeights | None,
    gradients: Reference | None,
    store: Workspace,
) -> Callable[[int], Weigh] | None:
    """Return a function from a sample to its g^2, as the recipe defines it."""
    if weights is None:
        return None
    if weights.weights == "modality":
        return lambda _: by_modality(weights.image)
    if weights.weights == "gradient" and gradients is not None:
        images = [image_tokens(model, unit, samples[number]) for number in range(len(samples))]
        return gradient_weights(SampleTensors(store.fetch(gradients)), images, weights.shrink).__getitem__
    return lambda _: uniform


def _rebuilt(file: Path, name: str) -> torch.Tensor:
    return unpack(torch.frombuffer(bytearray(file.read_bytes()), dtype=torch.uint8), name)


_held: HeldModel[BlockwiseModel] = HeldModel()


@contextmanager
def held_model(base: Base, device: Device) -> Iterator[BlockwiseModel]:
    """Yield the model without its blocks, kept between the steps of a run; it runs one unit at a time."""
    which = (str(base.model.folder), base.sha256, base.modules, device.place)
    with _held.lock:
        yield _held.get(which, lambda _: BlockwiseModel(base.open(), device.place))


def forget_blocks() -> None:
    """Let go of the model that is held between the steps of a run."""
    _held.clear()
