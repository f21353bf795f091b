"""The lineage record of a packed checkpoint, written beside it."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime

from bivlm.errors import InputError
from bivlm.reports.lineage import BaseModelFiles, Files, Lineage, read_lineage
from bivlm.workspace.environment import code, hardware, packages
from bivlm.workspace.hashing import digest
from tasks.compressed import CompressedModel
from tasks.runtime.steps import StepResult

# What differs between two runs that did the same thing, where a workspace may have been moved in between.
_CIRCUMSTANCES = {
    "created": True,
    "code": True,
    "packages": True,
    "hardware": True,
    "workspace": True,
    "tracking": {"uri"},
    "trigger": True,
}


def make_lineage(
    model: CompressedModel,
    evaluations: Mapping[str, StepResult],
    tracking: dict[str, str],
    trigger: str,
    workspace: str,
) -> Lineage:
    """Return the lineage record of the packed checkpoint: the one that lies beside it, if it says the same.

    `evaluations` are the steps that measured either model, by what they measured; the code, packages and hardware are
    those of the run that wrote the record, while each step names its own.
    """
    base, packed = model.base, model.checkpoint
    canonical = model.recipe.canonical()
    by_stage = _steps_by_stage(model)
    steps = [model.samples, *model.between, packed.step, *evaluations.values()]
    steps += [step for stages in by_stage.values() for step in stages.values()]
    tensors = {layer.disk_name: layer.weight_sha256 for layer in model.layers}
    tensors |= {embedding.linear.disk_name: embedding.weight_sha256 for embedding, _ in model.embeddings}
    lineage = Lineage(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        base_model=BaseModelFiles(
            id=base.model.id,
            revision=base.model.revision,
            sha256=base.sha256,
            files=base.digests.files,
            tensors=tensors,
        ),
        recipe=canonical,
        recipe_sha256=digest(canonical),
        code=code(),
        packages=packages(),
        hardware=hardware(),
        workspace=workspace,
        calibration=model.samples.key,
        layers={name: {stage: step.key for stage, step in stages.items()} for name, stages in by_stage.items()},
        checkpoint=packed.step.key,
        packed=Files(sha256=packed.sha256, files=dict(packed.files)),
        evaluations={name: step.key for name, step in evaluations.items()},
        tracking=tracking,
        trigger=trigger,
        steps={step.key: step.record for step in steps},
    )
    earlier = _earlier(packed.folder)
    return earlier if earlier is not None and _same(earlier, lineage) else lineage


def _steps_by_stage(model: CompressedModel) -> dict[str, dict[str, StepResult]]:
    """Return the steps of every packed tensor by stage."""
    by_stage = {
        layer.name: {
            "statistics": layer.statistics,
            "plan": layer.plan,
            **({layer.block.record.stage: layer.block} if layer.block else {}),
            "pack": model.shards[layer.name],
        }
        for layer in model.layers
    }
    return by_stage | {embedding.name: {"pack": step} for embedding, step in model.embeddings}


def _earlier(folder: str) -> Lineage | None:
    try:
        return read_lineage(folder)
    except InputError:
        return None


def _same(one: Lineage, other: Lineage) -> bool:
    return one.model_dump(exclude=_CIRCUMSTANCES) == other.model_dump(exclude=_CIRCUMSTANCES)
