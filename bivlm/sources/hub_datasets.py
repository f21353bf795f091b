"""Data sets of the Hugging Face hub: which commit a name stands for, and which of the hub's answers are final."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

import httpx2  # the hub's
from datasets.exceptions import DatasetsError
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

from bivlm.errors import InputError, describe
from bivlm.names import check_commit, check_revision

_OF_THIS_MACHINE = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS}  # no room for a file, or no right to it
_REFUSALS = {400, 401, 403, 404}  # no such name, no access, no such data set or file, no such revision


def commit_of(name: str, revision: str | None, *, key: str, prefix: str) -> str:
    """The commit of the data set OWNER/NAME that a revision (None: the newest) stands for.

    Messages begin with `key`, and `prefix` stands before a name or folder where the user writes them. Raises
    `InputError` for what the hub does not have or does not give, and ConnectionError when it cannot be reached.
    """
    check_revision(revision, f"{key}: {name}")
    wanted = f"{name} at revision {revision}" if revision else name
    try:
        with hub_asked(f"{key}: no folder {name}", wanted, f"{key}: the hub cannot be reached for"):
            return check_commit(HfApi().dataset_info(name, revision=revision).sha, f"{key}: {name}")
    except HFValidationError:
        raise InputError(f"{key}: found {prefix + name!r}, expected {prefix}OWNER/NAME or {prefix}FOLDER") from None
    except OfflineModeIsEnabled:
        raise InputError(
            f"{key}: no folder {name}, and the hub may not be asked for {wanted}, because HF_HUB_OFFLINE is set; "
            f"download its parquet files and give their folder as {prefix}FOLDER"
        ) from None


@contextmanager
def hub_asked(otherwise: str, wanted: str, unreachable: str) -> Iterator[None]:
    """Within it, an answer of the hub that will stay as it is becomes `InputError`, other trouble ConnectionError."""
    try:
        yield
    except (HFValidationError, OfflineModeIsEnabled, DatasetsError):
        raise
    except (httpx2.HTTPError, OSError) as error:
        if isinstance(error, HfHubHTTPError) and error.response.status_code in _REFUSALS:
            raise InputError(f"{otherwise}, and the hub gives no data set {wanted}: {describe(error)}") from error
        if isinstance(error, OSError) and error.errno in _OF_THIS_MACHINE:
            raise
        raise ConnectionError(f"{unreachable} the data set {wanted}: {describe(error)}") from error
