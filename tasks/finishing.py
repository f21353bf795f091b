"""Finishing: tune packed layers together on the whole model's answers; shards become new shards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from prefect import task

from bivlm.calibration.frozen import load_samples
from bivlm.checkpoint.safetensors_file import file_order, outgoing_tensor, write_tensors
from bivlm.compression.finishing import Finished, FinishSettings, Leftover, finish
from bivlm.compression.layer import measure
from bivlm.evaluation.divergence import StoredLogProbabilities, reference_logits
from bivlm.evaluation.generation import default_batch_size, load_model
from bivlm.numerics.input_statistics import SiteStatistics
from bivlm.workspace.hashing import step_identity
from bivlm.workspace.steps import Workspace
from tasks import binarization
from tasks.checkpoint import LEFTOVERS_FILE, Base
from tasks.layers import Layer
from tasks.runtime.device import Device, gpu_slot
from tasks.runtime.policy import OVER_NETWORK, smaller_after_out_of_memory
from tasks.runtime.progress import Restartable
from tasks.runtime.steps import Figures, StepResult, do_step, open_workspace

STAGE = "finish"
LOGITS_STAGE = "calibration logits"
TUNED_STAGE = "tuned"
VERSION = 3
LOGITS_FILE = "logits.safetensors"


@task(name="finish", **OVER_NETWORK)
def finish_layers(
    base: Base,
    layers: Sequence[Layer],
    shards: dict[str, StepResult],
    frozen: StepResult,
    settings: FinishSettings,
    device: Device,
    workspace: str,
    leftovers: Mapping[str, str] | None = None,
) -> tuple[dict[str, StepResult], list[StepResult]]:
    """Tune the packed layers; returns the new shard of every layer by name, and the steps in between, tuning last.

    `leftovers` are names in the loaded model by name on disk (`Anatomy.leftovers`), for settings that tune them; if
    that helps, the last step has them as `LEFTOVERS_FILE`, and their names on disk among its figures.
    """
    store = open_workspace(workspace)
    inputs = {"checkpoint": base.sha256, "samples": frozen.record.figures["sha256"]}
    known = do_step(
        store,
        step_identity(LOGITS_STAGE, VERSION, inputs, None, exact=False, device=device.kind),
        lambda place: _write_logits(base, frozen, device, store, place / LOGITS_FILE),
    )
    logits = known.record.outputs[LOGITS_FILE]
    packed = {name: done.record.outputs[binarization.FILE] for name, done in shards.items()}
    inputs |= {"logits": logits.sha256, "packed": {name: reference.sha256 for name, reference in packed.items()}}
    kept = leftovers or {} if settings.leftovers else {}
    if kept:
        inputs["leftovers"] = sorted(kept)
    identity = step_identity(STAGE, VERSION, inputs, settings.model_dump(mode="json"), exact=False, device=device.kind)

    bar = Restartable(STAGE)

    def progress(done: int, total: int) -> None:
        bar.reach(settings.steps * done / total)

    def tune(place: Path) -> Figures:
        with gpu_slot(device), store.scratch() as folder:
            model, processor = load_model(base.model.folder, device.place)
            samples = load_samples(store.fetch_folder(frozen.record.outputs, folder))
            tensors = {name: _read(store.fetch(reference)) for name, reference in packed.items()}
            checkpoint = base.open()
            stored = {disk_name: Leftover(name, checkpoint.read(disk_name)) for disk_name, name in kept.items()}
            with StoredLogProbabilities(store.fetch(logits), len(samples)) as full_precision:
                arguments = (model, processor, tensors, samples, full_precision, settings, progress)
                finished = smaller_after_out_of_memory(
                    lambda size: finish(*arguments, leftovers=stored, together=size),
                    min(default_batch_size(model), settings.batch),
                )
        return _write(finished, place)

    tuned = do_step(store, identity, tune)
    bar.reach(settings.steps)
    return {layer.name: _measured(layer, shards[layer.name], tuned, store) for layer in layers}, [known, tuned]


def _write(finished: Finished, place: Path) -> Figures:
    """Write the tuned layers and leftovers; return the step's figures."""
    for name, tensor in finished.packed.items():
        (place / name).write_bytes(memoryview(tensor.numpy()))
    if finished.leftovers:
        tensors = [outgoing_tensor(name, values) for name, values in finished.leftovers.items()]
        write_tensors(place / LEFTOVERS_FILE, file_order(tensors))
    return {
        "kl_before": finished.kl_before,
        "kl_after": finished.kl_after,
        "steps": finished.steps,
        "learning_rate": finished.learning_rate,
        **({"leftovers": sorted(finished.leftovers)} if finished.leftovers else {}),
    }


def _write_logits(base: Base, frozen: StepResult, device: Device, store: Workspace, file: Path) -> Figures:
    """Write the full-precision model's logits on the calibration samples."""
    with gpu_slot(device), store.scratch() as folder:
        model, processor = load_model(base.model.folder, device.place)
        reference_logits(model, processor, load_samples(store.fetch_folder(frozen.record.outputs, folder)), file)
    return {}


def _measured(layer: Layer, shard: StepResult, tuned: StepResult, store: Workspace) -> StepResult:
    """Return the tuned shard of one layer as a step like that of its packing, with its errors measured again."""
    reference = tuned.record.outputs[layer.name]
    inputs = {"weight": layer.weight_sha256, "tuned": reference.sha256}
    if layer.inputs is not None:
        inputs["inputs"] = layer.inputs.sha256

    def look(place: Path) -> Figures:
        packed = _read(store.fetch(reference))
        seen = SiteStatistics.load(store.fetch(layer.inputs)) if layer.inputs else None
        record = measure(layer.read_weight(), packed, f"{layer.name}, finished", seen, shard.record.figures["figures"])
        (place / binarization.FILE).write_bytes(memoryview(packed.numpy()))
        return record.model_dump(mode="json")

    return do_step(store, step_identity(TUNED_STAGE, VERSION, inputs, None, exact=False), look)


def _read(file: Path) -> torch.Tensor:
    return torch.frombuffer(bytearray(file.read_bytes()), dtype=torch.uint8)
