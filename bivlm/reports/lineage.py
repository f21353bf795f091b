"""The lineage of a packed checkpoint, as a record that can be checked against what is stored.

The record holds the identity of every step, and a step's key is the digest of its identity: whoever changes an input, a
setting or a hash anywhere in the chain breaks a key. The end of the chain are the packed tensors in the checkpoint,
which are the outputs of their steps byte for byte.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from huggingface_hub.errors import HFValidationError
from pydantic import BaseModel, ConfigDict, Field, JsonValue, field_validator

from bivlm.checkpoint.disk_names import packed_disk_names
from bivlm.checkpoint.reading import LINEAGE, Checkpoint, digest_of_files, refuse_links_out_of
from bivlm.checkpoint.safetensors_file import file_chunks, file_order, outgoing, tensor_chunks
from bivlm.errors import InputError
from bivlm.sources.models import cached_model
from bivlm.untrusted import RECORD, parse_model, read_bytes, short
from bivlm.workspace.hashing import digest
from bivlm.workspace.steps import MissingObject, StepRecord, Workspace, WorkspaceError
from bivlm.workspace.stores.location import default_workspace, is_s3_model

FORMAT = 1
PACK_STAGE, ALLOCATION_STAGE, SEARCH_STAGE, TABLES_STAGE = "pack", "allocation", "block search", "tables"
# Under a budget of bits, or after a search, a layer's settings are chosen by a step that says which.
_CHOOSING = (ALLOCATION_STAGE, SEARCH_STAGE)

State = Literal["holds", "broken", "not checked"]


class Files(BaseModel):
    """A checkpoint as files: sha256 by name, and the one sha256 over all of them (`digest_of_files`)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sha256: str
    files: dict[str, str]


class BaseModelFiles(Files):
    """The full-precision checkpoint: the id in the request, and the hub's commit (None for a folder).

    `tensors` are the sha256 of the tensors that were packed, by their names on disk.
    """

    id: str
    revision: str | None
    tensors: dict[str, str]


class Lineage(BaseModel):
    """Everything that a packed checkpoint was made of.

    `layers` names the steps of each layer by stage, `steps` holds every step's record by its key. `evaluations` names
    steps by what they measured. `tracking` says where MLflow holds it all, `trigger` what requested it (None in records
    of before that was written down).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: int = FORMAT
    created: str  # ISO 8601, UTC
    base_model: BaseModelFiles
    recipe: dict[str, JsonValue]
    recipe_sha256: str
    code: dict[str, str | bool]
    packages: dict[str, str]
    hardware: dict[str, str | int]
    workspace: str
    calibration: str
    layers: dict[str, dict[str, str]]
    checkpoint: str
    packed: Files
    evaluations: dict[str, str] = Field(default_factory=dict)
    tracking: dict[str, str]
    trigger: str | None = None
    steps: dict[str, StepRecord]

    @field_validator("recipe")
    @classmethod
    def _has_settings(cls, recipe: dict[str, JsonValue]) -> dict[str, JsonValue]:
        """Check only what is read of it again: recipes of other versions have other keys."""
        if not isinstance(recipe.get("name"), str):
            raise ValueError(f"name: expected text, found {short(recipe.get('name'))}")
        components, _ = _settings(recipe, "components"), _settings(recipe, "tables")
        for component, settings in components.items():
            if not isinstance(settings, dict) or not isinstance(settings.get("method"), str):
                raise ValueError(f"components.{component}: expected settings with a method, found {short(settings)}")
        asked = recipe.get("evaluation") or []
        if not isinstance(asked, list) or not all(isinstance(name, str) for name in asked):
            raise ValueError(f"evaluation: expected names of benchmarks, found {short(asked)}")
        return recipe

    @field_validator("code")
    @classmethod
    def _has_version(cls, code: dict[str, str | bool]) -> dict[str, str | bool]:
        if "version" not in code:
            raise ValueError("version: the key is missing")
        return code

    @field_validator("steps")
    @classmethod
    def _say_what_they_chose(cls, steps: dict[str, StepRecord]) -> dict[str, StepRecord]:
        for key, step in steps.items():
            if step.stage in _CHOOSING and not isinstance(found := step.figures.get("settings"), dict):
                raise ValueError(f"{key}.figures.settings: expected settings by layer, found {short(found)}")
        return steps


@dataclass(frozen=True)
class Finding:
    """One thing that was checked: its name, whether it is as recorded, and what differs or could not be reached."""

    subject: str
    state: State
    detail: str


def _settings(record: Mapping[str, JsonValue], key: str) -> dict[str, JsonValue]:
    """Return the settings by name that a record has under `key`, if any; raise ValueError if that is no mapping."""
    found = record.get(key) or {}
    if not isinstance(found, dict):
        raise ValueError(f"{key}: expected settings by name, found {short(found)}")
    return found


def read_lineage(folder: str | Path) -> Lineage:
    """Return the record of a packed checkpoint's folder; raise `InputError` naming the file and what is wrong."""
    file = Path(folder) / LINEAGE
    if not file.exists():
        raise InputError(f"{file}: the file is missing; expected the folder of a packed checkpoint")
    refuse_links_out_of([file], Path(folder))
    lineage = parse_model(Lineage, read_bytes(file, RECORD.max_bytes), file, "a lineage record")
    if lineage.format != FORMAT:
        raise InputError(f"{file}: format {lineage.format}, this code reads {FORMAT}; update bivlm")
    return lineage


def stage_hashes(lineage: Lineage) -> dict[str, str]:
    """Return a hash per stage: its step's key, or the digest of its steps' keys by layer."""
    by_stage: dict[str, dict[str, str]] = {}
    for layer, steps in lineage.layers.items():
        for stage, key in steps.items():
            by_stage.setdefault(stage, {})[layer] = key
    return {
        "calibration": lineage.calibration,
        **{stage: digest(keys) for stage, keys in by_stage.items()},
        "checkpoint": lineage.checkpoint,
        **lineage.evaluations,
    }


def verify(lineage: Lineage, folder: str | Path, workspace: Workspace | None = None) -> list[Finding]:
    """Return what holds and what does not, from the stored checkpoint back to the base model.

    Hashes every file that can be reached: those of the checkpoint in `folder`, of the base model if this machine has
    it, of the steps if `workspace` is given. What cannot be reached is "not checked", which is no failure.
    """
    return [*verify_folder(lineage, folder), _base_model(lineage), *_workspace(lineage, workspace)]


def verify_folder(lineage: Lineage, folder: str | Path) -> list[Finding]:
    """Return the findings of `verify` that need the stored checkpoint and the record alone."""
    return [
        _finding("packed files", _packed_files, lineage, Path(folder)),
        _finding("packed weights", _packed_tensors, lineage, Path(folder)),
        *([_finding("leftovers", _leftovers, lineage, Path(folder))] if _tuned_leftovers(lineage) else []),
        _finding("recipe", _recipe, lineage),
        _finding("step keys", _keys, lineage),
        _finding("links", _links, lineage),
    ]


def find_workspace(location: str) -> Workspace | None:
    """Return the workspace at `location` if it can be reached; nothing is written there."""
    try:
        return Workspace.look_into(location)
    except (InputError, OSError):
        return None


def own_workspace(lineage: Lineage) -> Workspace | None:
    """Return the workspace that the record names, read only, if it is this machine's own (`default_workspace`).

    A record may come from anybody. Any other place that it names is not looked into: that alone would send a signed
    request to a stranger's bucket.
    """
    own = default_workspace()
    own = own.rstrip("/") if own.startswith("s3://") else str(Path(own).expanduser().absolute())
    return find_workspace(own) if own == lineage.workspace else None


def _finding(subject: str, check: Callable[..., tuple[list[str], str]], *arguments: Any) -> Finding:
    """Return what `check` finds: it returns the problems, and what to say where there is none."""
    try:
        problems, holds = check(*arguments)
    except InputError as error:
        problems, holds = [str(error)], ""
    if not problems:
        return Finding(subject, "holds", holds)
    more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
    return Finding(subject, "broken", "; ".join(problems[:3]) + more)


def _packed_files(lineage: Lineage, folder: Path) -> tuple[list[str], str]:
    found = Checkpoint.open(folder).digests().files
    return list(_differences(lineage.packed, found)), f"{len(found)} files, sha256 {lineage.packed.sha256}"


def _differences(recorded: Files, found: dict[str, str]) -> Iterator[str]:
    for name in sorted(recorded.files.keys() | found.keys()):
        if name not in found:
            yield f"{name} is missing"
        elif name not in recorded.files:
            yield f"{name} was not there when it was recorded"
        elif found[name] != recorded.files[name]:
            yield f"{name} has other bytes: sha256 {found[name]}, recorded {recorded.files[name]}"
    if digest_of_files(recorded.files) != recorded.sha256:
        yield "the recorded files do not give the recorded sha256"


def _packed_tensors(lineage: Lineage, folder: Path) -> tuple[list[str], str]:
    """Check that each packed tensor of the checkpoint is the output of its layer's step, byte for byte."""
    checkpoint = Checkpoint.open(folder)
    disk_names = packed_disk_names(checkpoint)
    if disk_names is None:
        from bivlm.checkpoint.linears import anatomy  # takes seconds to import

        disk_names = {name: linear.disk_name for name, linear in anatomy(checkpoint).packable.items()}
    problems = []
    for name in sorted(lineage.layers.keys() | checkpoint.packed.keys()):
        if name not in lineage.layers:
            problems.append(f"{name} is packed, and has no steps")
        elif name not in checkpoint.packed:
            problems.append(f"{name} has steps, and is not packed")
        elif name not in disk_names:
            problems.append(f"{name} is packed, and the model has no such layer")
        else:
            sha = hashlib.sha256()
            for chunk in tensor_chunks(checkpoint.entries[disk_names[name]]):
                sha.update(chunk)
            step = lineage.steps.get(lineage.layers[name].get(PACK_STAGE, ""))
            if step is None or sha.hexdigest() not in {reference.sha256 for reference in step.outputs.values()}:
                problems.append(f"{name} is not what its step made")
    return problems, f"{len(lineage.layers)} tensors are the outputs of their steps"


def _tuned_leftovers(lineage: Lineage) -> str | None:
    """Return the sha256 of the tuned leftovers that the checkpoint was made from; None if there are none."""
    made = lineage.steps.get(lineage.checkpoint)
    inputs = made.identity.get("inputs") if made is not None else None
    found = inputs.get("leftovers") if isinstance(inputs, dict) else None
    return found if isinstance(found, str) else None


def _leftovers(lineage: Lineage, folder: Path) -> tuple[list[str], str]:
    """Check that tensors which finishing has tuned are what its step made: written anew they give its file's sha256."""
    expected = _tuned_leftovers(lineage)
    makers = [each for each in lineage.steps.values() if expected in {out.sha256 for out in each.outputs.values()}]
    said = makers[0].figures.get("leftovers") if makers else None
    if not isinstance(said, list):
        return [f"no step says which tensors are in the leftovers {expected}"], ""
    entries = Checkpoint.open(folder).entries
    if missing := [name for name in said if not isinstance(name, str) or name not in entries]:
        return [f"{short(missing[0])} was tuned, and is not in the checkpoint"], ""
    named = [str(name) for name in said]
    sha = hashlib.sha256()
    for chunk in file_chunks(file_order(outgoing(entries[name]) for name in named)):
        sha.update(chunk)
    same = sha.hexdigest() == expected
    problems = [] if same else [f"{len(named)} tuned tensors are not what their step made (sha256 {expected})"]
    return problems, f"{len(named)} tuned tensors are the output of their step"


def _recipe(lineage: Lineage) -> tuple[list[str], str]:
    found = digest(lineage.recipe)
    problems = [] if found == lineage.recipe_sha256 else [f"sha256 {found}, recorded {lineage.recipe_sha256}"]
    settings = list(_settings(lineage.recipe, "components").values())
    chosen = [_settings(each.figures, "settings") for each in lineage.steps.values() if each.stage in _CHOOSING]
    of_tables = list(_settings(lineage.recipe, "tables").values())
    for name, steps in lineage.layers.items():
        plan, packed = (lineage.steps.get(steps.get(stage, "")) for stage in ("plan", PACK_STAGE))
        allowed = [each.get(name) for each in chosen] or settings
        if plan is not None and plan.identity.get("recipe") not in allowed:
            problems.append(f"{name} was planned with other settings")
        if packed is not None and packed.stage == TABLES_STAGE and packed.identity.get("recipe") not in of_tables:
            problems.append(f"{name} was rounded with other settings")
    return problems, f"{lineage.recipe.get('name')}, sha256 {lineage.recipe_sha256}"


def _keys(lineage: Lineage) -> tuple[list[str], str]:
    problems = [f"step {key} has the key {record.key}" for key, record in lineage.steps.items() if record.key != key]
    named = {lineage.calibration, lineage.checkpoint, *lineage.evaluations.values()}
    named.update(key for steps in lineage.layers.values() for key in steps.values())
    problems += [f"step {key} is named and not recorded" for key in sorted(named - lineage.steps.keys())]
    return problems, f"{len(lineage.steps)} keys are the digests of their steps"


def _links(lineage: Lineage) -> tuple[list[str], str]:
    """Check that every step's inputs are the base model, the packed checkpoint, or something that a step made."""
    known = {lineage.base_model.sha256, lineage.packed.sha256, *lineage.base_model.tensors.values()}
    for record in lineage.steps.values():
        known.update(reference.sha256 for reference in record.outputs.values())
        # Sets of files have one hash over all of them among the figures: samples, questions.
        hashes = (value for key, value in record.figures.items() if key.endswith("sha256"))
        known.update(value for value in hashes if isinstance(value, str))
    problems = [
        f"{record.stage} step {key}: its input {name} ({value}) is made by no step"
        for key, record in lineage.steps.items()
        for name, value in _hashes(record.identity.get("inputs"))
        if value not in known
    ]
    final = lineage.steps.get(lineage.checkpoint)
    if final is not None and final.figures.get("sha256") != lineage.packed.sha256:
        problems.append(f"the checkpoint step made {final.figures.get('sha256')}, not {lineage.packed.sha256}")
    return problems, "every input is the base model or was made by a recorded step"


def _hashes(value: JsonValue, name: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _hashes(item, f"{name}.{key}" if name else key)
    elif isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef"):
        yield name, value


def _base_model(lineage: Lineage) -> Finding:
    base = lineage.base_model
    shown = f"{base.id}, revision {base.revision}" if base.revision else base.id
    folder = _find_base(base)
    if folder is None:
        return Finding("base model", "not checked", f"{shown} is not on this machine")

    def check() -> tuple[list[str], str]:
        found = Checkpoint.open(folder).digests()
        changed = [name for name, sha256 in base.tensors.items() if found.tensors.get(name) != sha256]
        problems = [*_differences(base, found.files), *(f"tensor {name} has other bytes" for name in changed)]
        return problems, f"{shown}, sha256 {base.sha256}"

    return _finding("base model", check)


def _find_base(base: BaseModelFiles) -> Path | None:
    """Return the base model's folder on this machine. The record may be a stranger's: nothing it names is fetched."""
    if base.revision is None:
        try:
            return Path(base.id) if Path(base.id).is_dir() else None
        except OSError:
            return None
    if base.id.startswith("s3://"):
        from bivlm.sources.s3_models import cached_copy

        return cached_copy(base.id, base.revision) if is_s3_model(base.id) else None
    try:
        return cached_model(base.id, base.revision)
    except HFValidationError:
        return None


def _workspace(lineage: Lineage, workspace: Workspace | None) -> list[Finding]:
    """Check that the workspace holds every step's record as it is here, and the bytes of every output."""
    if workspace is None:
        said = f"{lineage.workspace} was not given, or cannot be opened here; say --workspace {lineage.workspace}"
        return [Finding("workspace", "not checked", said)]
    problems, absent, held = [], 0, 0
    for key, record in lineage.steps.items():
        stored = workspace.record(key)
        if stored is not None and not stored.says_the_same_as(record):
            problems.append(f"{record.stage} step {key} has another record there")
        for name, reference in record.outputs.items():
            try:
                workspace.fetch(reference)
                held += 1
            except MissingObject:
                absent += 1
            except WorkspaceError:
                problems.append(f"{name} of {record.stage} step {key} has other bytes than {reference.sha256}")
    findings = [_finding("workspace", lambda: (problems, f"{held} files of steps at {workspace.url}"))]
    if absent:
        findings.append(Finding("workspace", "not checked", f"{absent} files of steps are no longer there"))
    return findings
