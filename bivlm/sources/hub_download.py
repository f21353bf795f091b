"""Download large files of the Hugging Face hub into its cache, resuming where an earlier download was cut short.

Since version 2 huggingface_hub gives every download a temporary file of its own and drops it when the process dies, so
that a killed download of tens of gigabytes starts over. Here a file is fetched into ``<sha256>.incomplete`` beside its
place in the cache, where the next attempt finds it. When it is whole and has the sha256 that the hub says, it is
renamed, and huggingface_hub finds it there. The download uses range requests over plain HTTP, which hubs serve for xet
storage too.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2  # the hub's
from huggingface_hub import constants, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.file_download import http_get, repo_folder_name
from huggingface_hub.utils import WeakFileLock, build_hf_headers  # type: ignore[attr-defined]  # exports at run time
from huggingface_hub.utils.tqdm import tqdm

from bivlm.errors import InputError
from bivlm.names import is_sha256
from bivlm.workspace.hashing import file_digest

AT_ONCE = 4
FRUITLESS_ATTEMPTS = 3  # in a row, none of which brought a byte
_PAUSE_SECONDS = 1.0  # doubled after each
_HTTP_LIMIT = constants.MAX_HTTP_DOWNLOAD_SIZE


@dataclass(frozen=True)
class LargeFile:
    """A file that the hub keeps outside git: its name in the repository, its bytes, and the sha256 of these."""

    name: str
    size: int
    sha256: str


def repository_folder(model: str) -> Path:
    """Return where the hub's cache holds `model`: ``blobs``, ``snapshots`` and ``refs``."""
    return Path(constants.HF_HUB_CACHE).expanduser() / repo_folder_name(repo_id=model, repo_type="model")


def download_large(model: str, commit: str, files: Sequence[LargeFile]) -> None:
    """Put `files` of `model` at `commit` into the hub's cache, as far as they are not there.

    Files beyond 50 GB, which the hub does not serve over plain HTTP, are left to huggingface_hub. A bar in the terminal
    shows the bytes. Raises `InputError` with figures if the disk cannot hold them, and what the hub's client raises:
    `HfHubHTTPError` for a refusal, a transport error after some fruitless attempts. What was fetched until then stays.
    """
    blobs = repository_folder(model) / "blobs"
    odd = next((file for file in files if not is_sha256(file.sha256)), None)
    if odd is not None:
        raise InputError(f"model {model!r}: the hub gives {odd.name} the sha256 {odd.sha256!r}; expected 64 hex digits")
    wanted = {file.sha256: file for file in files if 0 < file.size <= _HTTP_LIMIT}
    wanted = {sha256: file for sha256, file in wanted.items() if not (blobs / sha256).exists()}
    if not wanted:
        return
    blobs.mkdir(parents=True, exist_ok=True)
    total, held = sum(file.size for file in wanted.values()), sum(_held(blobs / sha256) for sha256 in wanted)
    free = shutil.disk_usage(blobs).free
    if total - held > free:
        raise InputError(
            f"model {model!r}: {(total - held) / 1e9:.1f} GB are to be downloaded to {blobs}, {free / 1e9:.1f} GB are "
            "free; make room, or set HF_HUB_CACHE to a folder on another disk"
        )
    ended = threading.Event()
    bar = tqdm(total=total, initial=held, desc=model, unit="B", unit_scale=True, disable=None, name="bivlm")
    with bar, ThreadPoolExecutor(AT_ONCE) as threads:
        jobs = [
            threads.submit(_download, model, commit, file, blobs / file.sha256, _share_of(bar, ended))
            for file in sorted(wanted.values(), key=lambda file: file.name)
        ]
        try:
            for job in jobs:
                job.result()
        finally:
            # After a failure, or Ctrl-C, the others end with the piece they are at.
            ended.set()
            threads.shutdown(cancel_futures=True)


class _EndedError(Exception):
    """Another file failed, or the user ended the download."""


def _download(model: str, commit: str, file: LargeFile, blob: Path, progress: type) -> None:
    lock = repository_folder(model).parent / ".locks" / blob.parent.parent.name / f"{blob.name}.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):  # the client's own, so that it and we wait for each other
        if blob.exists():
            return
        partial = _partial(blob)
        if partial.exists() and partial.stat().st_size > file.size:
            partial.unlink()
        _complete(model, commit, file, partial, progress)
        if file_digest(partial) != file.sha256:
            partial.unlink()
            raise ConnectionError(
                f"model {model!r}: {file.name} came with other bytes than the hub says it has; they were removed"
            )
        partial.replace(blob)


def _complete(model: str, commit: str, file: LargeFile, partial: Path, progress: type) -> None:
    """Append to `partial` what is missing, again and again as long as that brings something."""
    attempts = 0
    while True:
        held = partial.stat().st_size if partial.exists() else 0
        try:
            with partial.open("ab") as stream:
                # By the hub's own address each time: the signed one that it leads to expires.
                http_get(
                    hf_hub_url(model, file.name, revision=commit),
                    stream,
                    resume_size=held,
                    headers=build_hf_headers() | {"Accept-Encoding": "identity"},
                    expected_size=file.size,
                    displayed_filename=file.name,
                    tqdm_class=progress,
                )
            return
        except (httpx2.TransportError, OSError) as error:
            refused = isinstance(error, HfHubHTTPError) and not _may_heal(error)
            if refused or (isinstance(error, OSError) and error.errno is not None):  # a full disk, say
                raise
            if partial.stat().st_size > file.size:
                partial.unlink()
            attempts = 1 if partial.exists() and partial.stat().st_size > held else attempts + 1
            if attempts >= FRUITLESS_ATTEMPTS:
                raise
        time.sleep(_PAUSE_SECONDS * 2 ** (attempts - 1))


def _may_heal(error: HfHubHTTPError) -> bool:
    """Return whether a retry may help: the hub is in trouble, or a signed address of another host has expired."""
    response = error.response
    return response.status_code >= httpx2.codes.INTERNAL_SERVER_ERROR or bool(response.history)


def _share_of(bar: Any, ended: threading.Event) -> type:
    """Return a stand-in for the bar of one file: it moves `bar`, which is of all files."""

    class Share:
        def __init__(self, *_: Any, **__: Any) -> None:
            pass

        def __enter__(self) -> Share:
            return self

        def __exit__(self, *_: Any) -> None:
            pass

        def close(self) -> None:
            pass

        def update(self, count: float | None = 1) -> None:
            if ended.is_set():
                raise _EndedError
            bar.update(count)

    return Share


def _partial(blob: Path) -> Path:
    return blob.with_name(f"{blob.name}.incomplete")


def _held(blob: Path) -> int:
    partial = _partial(blob)
    return partial.stat().st_size if partial.exists() else 0
