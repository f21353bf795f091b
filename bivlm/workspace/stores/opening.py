"""Open a store by its location."""

from __future__ import annotations

from pathlib import Path

from bivlm.addresses import without_credentials
from bivlm.errors import InputError
from bivlm.workspace.stores.base import Store
from bivlm.workspace.stores.folder import FolderStore


def open_store(location: str | Path, look_only: bool = False) -> Store:
    """Open the store at a folder (made if it is missing) or at ``s3://bucket/prefix``.

    With `look_only` nothing is written to find out whether that can be done, and a folder must be there already.
    Raises `InputError` naming the location if it cannot be one.
    """
    if str(location).startswith("s3://"):
        # Imported here, so that a folder never needs boto3.
        from bivlm.workspace.stores.s3 import S3Store

        return S3Store(str(location))
    if "://" in str(location):
        raise InputError(f"workspace {without_credentials(str(location))}: expected a folder or s3://bucket/prefix")
    return FolderStore(Path(location), look_only)
