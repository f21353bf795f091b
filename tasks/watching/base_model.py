"""Which bytes a base model is asked for by: its revision, pinned."""

from __future__ import annotations

from pathlib import Path

from prefect import task

from bivlm.checkpoint.reading import Checkpoint
from bivlm.errors import InputError
from tasks.runtime.policy import OVER_NETWORK
from tasks.watching.revisions import hub_revision
from tasks.watching.watch_lists import is_pinned, kind_of


@task(name="pin-revision", **OVER_NETWORK)
def pin_revision(model: str, revision: str | None) -> str:
    """The commit of a branch (default: the main one) of the hub, or what a folder or S3 prefix holds now.

    Raises `InputError` if that is another revision than the one asked for. A commit of the hub is taken as it is, so
    that a model in the hub's cache needs no hub.
    """
    kind = kind_of(model)
    if kind == "hub":
        if Path(model).is_dir():
            raise InputError(f"model {model!r}: a folder of that name is in {Path.cwd()}; expected a model of the hub")
        return revision if revision and is_pinned(kind, revision) else hub_revision(model, revision)
    if kind == "s3":
        from bivlm.sources.s3_models import cached_copy, list_prefix

        if revision is not None and cached_copy(model, revision) is not None:
            return revision
        found = list_prefix(model).revision
    else:
        found = Checkpoint.open(model).digest()
    if revision not in (None, found):
        raise InputError(f"model {model}: now at {found}; {revision}, which was asked for, is gone")
    return found
