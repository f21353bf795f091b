"""Fetch a model by folder, by ``s3://bucket/prefix``, or by its id on the Hugging Face hub; only what is needed.

The list of files and config.json come first: what cannot be used is refused before gigabytes are on their way.
"""

from __future__ import annotations

import glob
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2  # the hub's
from huggingface_hub import HfApi, get_cached_repo_tree, snapshot_download
from huggingface_hub.errors import (
    CachedRepoTreeNotFoundError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RevisionResolutionError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils.tqdm import tqdm

from bivlm.checkpoint.pickles import pickle_names, pickles_refused
from bivlm.checkpoint.reading import (
    CONFIG,
    GENERATE,
    TEMPLATES,
    WEIGHTS,
    WEIGHTS_INDEX,
    is_licence_name,
    is_side_name,
    names_code,
    weights_of_index,
)
from bivlm.checkpoint.remote_code import remote_code_allowed, unknown_architecture
from bivlm.errors import InputError
from bivlm.names import check_commit, check_revision, is_commit
from bivlm.sources.hub_download import LargeFile, download_large, repository_folder
from bivlm.sources.hub_errors import hub_error

CARD = "README.md"  # not of the checkpoint; it says what licence the model has

HUB_TROUBLE = (
    httpx2.HTTPError,  # HfHubHTTPError among them
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RevisionResolutionError,
)


@dataclass(frozen=True)
class ResolvedModel:
    """Where a model lies: `folder`, the `id` it was requested by, and its revision (None for a folder).

    On the hub that is the commit's hash; below an S3 prefix see `bivlm.sources.s3_models`.
    """

    folder: Path
    id: str
    revision: str | None


def resolve_model(model: str, revision: str | None = None) -> ResolvedModel:
    """Return a local folder as it is, ``s3://`` copied, anything else from the Hugging Face hub (offline, its cache).

    `revision` is a branch, tag or commit; the result names the commit that a branch is at when this is called. (Below
    an S3 prefix it is the state that is expected, see `bivlm.sources.s3_models`.) A snapshot that is whole in the
    cache is used as it is. Raises `InputError` for a revision of a local folder, when neither folder nor hub has the
    model, and for one that cannot be used: gated, weights as pickles, needing code of its own that was not allowed
    (see `bivlm.checkpoint.remote_code`). `ConnectionError` when the hub cannot be reached and its cache has no copy.
    """
    if model and Path(model).is_dir():
        if revision is not None:
            raise InputError(f"model {model} is a folder, which has no revision {revision!r}; leave the revision out")
        return ResolvedModel(Path(model), model, None)
    if model.startswith("s3://"):
        from bivlm.sources.s3_models import fetch_model  # boto3, only where it is needed

        folder, found = fetch_model(model, revision)
        return ResolvedModel(folder, model, found)
    # The hub also knows ids without an owner, but no vision-language model is called so: it is a mistyped folder.
    if "/" not in model:
        raise InputError(f"model {model!r}: no such folder, and not a hub id of the form owner/name")
    check_revision(revision, f"model {model!r}")
    try:
        commit = check_commit(HfApi().resolve_revision(model, revision=revision).resolved, f"model {model!r}")
        folder = cached_model(model, commit) or _download(model, commit)
    except HFValidationError:
        raise InputError(f"model {model!r}: no such folder, and not a hub id of the form owner/name") from None
    except HUB_TROUBLE as error:
        raise hub_error(error, model, revision) from error
    return ResolvedModel(folder, model, commit)


def cached_model(model: str, commit: str) -> Path | None:
    """Return the snapshot of `model` at `commit` in the hub's cache if all that is needed of it is there, else None."""
    if not is_commit(commit):
        return None
    folder = repository_folder(model) / "snapshots" / commit
    try:
        names = [file.path for file in get_cached_repo_tree(model, revision=commit)]
    except CachedRepoTreeNotFoundError:  # a cache that an earlier client filled: what is there is all that is known
        names = [path.relative_to(folder).as_posix() for path in folder.rglob("*")]
    if not (folder / CONFIG).exists():
        return None
    try:
        needed = [*_side_names(names, folder), *_weight_names(names, folder)]
    except InputError:  # the index is not there yet
        return None
    return folder if all((folder / name).exists() for name in needed) else None


def _download(model: str, commit: str) -> Path:
    """Download what is needed of `model` at `commit`, in this order: config, small files, weights."""
    files = [
        entry for entry in HfApi().list_repo_tree(model, recursive=True, revision=commit) if isinstance(entry, RepoFile)
    ]
    names = [file.path for file in files]
    _check_names(model, commit, names)
    folder = _fetch(model, commit, [CONFIG])
    remote_code_allowed(folder)
    unknown = unknown_architecture(folder)
    if unknown:
        raise InputError(f"model {model!r}: {unknown}")
    _fetch(model, commit, [name for name in names if _is_small(name)])
    needed = [*_side_names(names, folder), *_weight_names(names, folder)]
    missing = sorted(set(needed) - set(names))
    if missing:
        raise InputError(f"model {model!r}: its {WEIGHTS_INDEX} names {missing[0]}, which the repository does not have")
    large = [LargeFile(each.path, each.lfs.size, each.lfs.sha256) for each in files if each.path in needed and each.lfs]
    download_large(model, commit, large)
    return _fetch(model, commit, needed)


def _check_names(model: str, commit: str, names: Sequence[str]) -> None:
    """Raise `InputError` unless the repository holds a model with safetensors, by the names of its files."""
    if CONFIG not in names:
        raise InputError(f"model {model!r}: its repository has no {CONFIG}; expected a model in transformers' format")
    if WEIGHTS not in names and WEIGHTS_INDEX not in names:
        pickles = pickle_names(names)
        if pickles:
            raise pickles_refused(f"model {model!r}", model, pickles, commit)
        raise InputError(f"model {model!r}: its repository has neither {WEIGHTS} nor {WEIGHTS_INDEX}")


def _is_small(name: str) -> bool:
    """Return whether a file is a config or the like; some of the tokenizer's files are large."""
    return "/" not in name and (name in (CARD, WEIGHTS_INDEX) or name.endswith("config.json") or is_licence_name(name))


def _side_names(names: Sequence[str], folder: Path) -> list[str]:
    """Return what goes with the weights; code only if a config in `folder` names it, or for a ``generate``."""
    code = names_code(folder) or f"{GENERATE}/generate.py" in names
    found = [
        name
        for name in names
        if "/" not in name
        and (name in (CONFIG, CARD) or is_side_name(name) or is_licence_name(name) or (code and name.endswith(".py")))
    ]
    ends = {TEMPLATES: ".jinja"} | ({GENERATE: ".py"} if code else {})
    return [*found, *(name for name in names if name.endswith(ends.get(name.rpartition("/")[0], "/")))]


def _weight_names(names: Sequence[str], folder: Path) -> list[str]:
    """Return the names that `Checkpoint.open` looks for: one file, else an index and what it names."""
    return [WEIGHTS] if WEIGHTS in names else [WEIGHTS_INDEX, *weights_of_index(folder)]


def _fetch(model: str, commit: str, names: Sequence[str]) -> Path:
    patterns = [glob.escape(name) for name in names]
    return Path(snapshot_download(model, revision=commit, allow_patterns=patterns, tqdm_class=_NoBar))


class _NoBar(tqdm):
    """Small files need no bar; the one of `download_large` is for the weights."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options | {"disable": True})
