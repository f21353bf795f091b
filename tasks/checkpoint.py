"""The base checkpoint's identity, and the packed checkpoint made from it and the shards."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefect import task

from bivlm.checkpoint.architectures import MODULES_KEY, Modules
from bivlm.checkpoint.linears import Anatomy, Linear, anatomy
from bivlm.checkpoint.outputs import check_replaceable, replace, settle, unfinished_of
from bivlm.checkpoint.reading import Checkpoint, Digests, digest_of_files
from bivlm.checkpoint.writing import check_loads, check_output, write_packed_checkpoint
from bivlm.errors import InputError
from bivlm.names import is_sha256
from bivlm.sources.models import ResolvedModel, resolve_model
from bivlm.workspace.hashing import digest, step_identity
from bivlm.workspace.places import output_folder
from tasks import binarization
from tasks.runtime.policy import OVER_NETWORK
from tasks.runtime.progress import advance
from tasks.runtime.steps import StepResult, finish, open_workspace

STAGE = "checkpoint"
VERSION = 1
LEFTOVERS_FILE = "leftovers.safetensors"  # output of the finishing step, see `tasks.finishing`


@dataclass(frozen=True)
class Base:
    """The model to compress: its folder, its hashes and its parts.

    `modules` are the recipe's, of an architecture that bivlm does not know.
    """

    model: ResolvedModel
    digests: Digests
    parts: Anatomy
    modules: Modules | None = None

    @property
    def linears(self) -> list[Linear]:
        return self.parts.linears

    @property
    def sha256(self) -> str:
        return self.digests.sha256

    def open(self) -> Checkpoint:
        """Open the checkpoint, headers alone."""
        return Checkpoint.open(self.model.folder, self.modules)


@task(name="base-model", **OVER_NETWORK)
def resolve_base(model: str, revision: str | None, output: str, modules: Modules | None = None) -> Base:
    """Find the model (a folder, or the hub), check that it is whole and may be packed into `output`, and hash it.

    The `revision` of a folder is the sha256 that its checkpoint must have.
    """
    is_folder = Path(model).is_dir()
    if not is_folder:  # before a download; of a folder, its own files in the output are no loss, see `check_output`
        check_replaceable(output_folder(output))
    expected = revision if is_sha256(revision) and is_folder else None
    resolved = resolve_model(model, None if expected else revision)
    checkpoint = Checkpoint.open(resolved.folder, modules)
    check_output(checkpoint, output)
    digests = checkpoint.digests()
    if expected not in (None, digests.sha256):
        raise InputError(f"model {model}: now at {digests.sha256}; {expected}, which was asked for, is gone")
    parts = anatomy(checkpoint)
    check_loads(checkpoint, checkpoint.folder)
    return Base(resolved, digests, parts, modules)


@dataclass(frozen=True)
class PackedCheckpoint:
    """A packed checkpoint in a folder; its step is `reused` if it already lay there, byte for byte."""

    folder: str
    sha256: str
    files: dict[str, str]  # sha256 by name
    step: StepResult


@task(name="checkpoint", **OVER_NETWORK)
def write_checkpoint(
    base: Base,
    chosen: Sequence[Linear],
    shards: dict[str, StepResult],
    quantization_config: dict[str, Any],
    output: str,
    workspace: str,
    tuned: StepResult | None = None,
) -> PackedCheckpoint:
    """Return the packed checkpoint, in `output` if it lies there already, else beside it.

    `tuned` is the step of finishing; leftovers among its outputs go before the base's tensors.

    There it waits for `put_in_place`, so that a run which fails leaves no output that looks finished.
    """
    place = output_folder(output)
    waiting = unfinished_of(place)
    settle(place)
    store = open_workspace(workspace)
    references = {name: done.record.outputs[binarization.FILE] for name, done in shards.items()}
    if base.modules:
        quantization_config = {**quantization_config, MODULES_KEY: base.modules}
    inputs: dict[str, Any] = {
        "checkpoint": base.sha256,
        "shards": {name: shard.sha256 for name, shard in references.items()},
    }
    leftovers = tuned.record.outputs.get(LEFTOVERS_FILE) if tuned is not None else None
    if leftovers is not None:
        inputs["leftovers"] = leftovers.sha256
    identity = step_identity(STAGE, VERSION, inputs, quantization_config, exact=True)
    record = store.step(digest(identity))
    for folder in (place, waiting) if record is not None else ():
        files = _digests_at(folder, base)
        if digest_of_files(files) == record.figures["sha256"]:
            advance(STAGE)
            return PackedCheckpoint(str(folder), record.figures["sha256"], files, StepResult(record, reused=True))
    started = time.perf_counter()
    packed = {name: store.fetch(reference) for name, reference in references.items()}
    replacing = store.fetch(leftovers) if leftovers is not None else None
    write_packed_checkpoint(base.open(), packed, chosen, waiting, quantization_config, leftovers=replacing)
    digests = Checkpoint.open(waiting).digests()
    step = finish(store, identity, {}, {"sha256": digests.sha256}, time.perf_counter() - started)
    advance(STAGE)
    return PackedCheckpoint(str(waiting), digests.sha256, digests.files, step)


def put_in_place(packed: PackedCheckpoint, output: str) -> None:
    """Move the checkpoint to `output`, once everything about it is recorded; see `outputs.replace`."""
    if packed.folder != output:
        replace(Path(output), Path(packed.folder))


def _digests_at(folder: Path, base: Base) -> dict[str, str]:
    """Return the files of the checkpoint packed from `base` in a folder; none if it cannot be read or loaded."""
    if not folder.is_dir():
        return {}
    try:
        check_loads(base.open(), folder)
        return Checkpoint.open(folder).digests().files
    except InputError:
        return {}
