"""A model below an S3 prefix: what is there now, and a pinned copy of it on this machine.

S3 prefixes have no commits. What stands for one is the sha256 of the names, lengths and ETags of all objects below the
prefix: it changes whenever an object is put with other bytes. A copy is made of one such state and is given its place
only if the prefix was still in it when the last byte had come.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from filelock import FileLock

from bivlm.addresses import without_credentials
from bivlm.checkpoint.reading import CONFIG, WEIGHTS, WEIGHTS_INDEX, indexed_files
from bivlm.errors import InputError
from bivlm.workspace.hashing import digest
from bivlm.workspace.stores.folder import temporary_beside
from bivlm.workspace.stores.location import cache_folder, is_s3_model
from bivlm.workspace.stores.s3 import s3_client, s3_trouble

SCHEME = "s3://"


@dataclass(frozen=True)
class S3Object:
    """Length in bytes and ETag."""

    size: int
    etag: str


@dataclass(frozen=True)
class S3Listing:
    """All objects below a prefix, by their name after it."""

    url: str
    objects: dict[str, S3Object]

    @cached_property
    def revision(self) -> str:
        """sha256 of names, lengths and ETags."""
        return digest({name: [each.size, each.etag] for name, each in self.objects.items()})


def list_prefix(url: str) -> S3Listing:
    """Return what is below `url` now; raise `InputError` where the bucket cannot be opened."""
    bucket, prefix = _parts(url)
    objects = {}
    for page in _pages(url, Bucket=bucket, Prefix=prefix):
        for each in page.get("Contents", ()):
            name = each["Key"].removeprefix(prefix)
            if name and not name.endswith("/"):
                objects[name] = S3Object(each["Size"], each["ETag"].strip('"'))
    return S3Listing(url, dict(sorted(objects.items())))


def list_models(url: str) -> list[str]:
    """Return the prefixes one level below `url`."""
    bucket, prefix = _parts(url)
    found = []
    for page in _pages(url, Bucket=bucket, Prefix=prefix, Delimiter="/"):
        found += [f"{SCHEME}{bucket}/{each['Prefix'].rstrip('/')}" for each in page.get("CommonPrefixes", ())]
    return sorted(found)


def what_is_missing(listing: S3Listing) -> str:
    """Return why these objects are not a whole model yet; empty if they are."""
    if CONFIG not in listing.objects:
        return f"no {CONFIG}"
    if WEIGHTS in listing.objects:
        return ""
    if WEIGHTS_INDEX not in listing.objects:
        return f"neither {WEIGHTS} nor {WEIGHTS_INDEX}"
    bucket, prefix = _parts(listing.url)
    try:
        with s3_trouble(_cannot_read(listing.url)):
            data = s3_client().get_object(Bucket=bucket, Key=prefix + WEIGHTS_INDEX)["Body"].read()
        files = indexed_files(data, f"{listing.url}/{WEIGHTS_INDEX}")
    except InputError as error:
        return str(error)
    absent = sorted(set(files) - listing.objects.keys())
    return f"{WEIGHTS_INDEX} names {absent[0]}, which is not there" if absent else ""


def fetch_model(url: str, revision: str | None = None) -> tuple[Path, str]:
    """Return (folder, revision): a copy of the model at `url` in the cache folder, made if it is not there.

    Raises `InputError` if the prefix is not (or no longer) in the state `revision`, or holds no model.
    """
    if not is_s3_model(url):
        raise InputError(f"model {without_credentials(url)!r}: expected s3://bucket/prefix")
    if revision is not None and (copy := cached_copy(url, revision)) is not None:
        return copy, revision
    listing = list_prefix(url)
    if revision is not None and listing.revision != revision:
        raise InputError(f"model {url}: now at {listing.revision}; {revision}, which was asked for, is gone")
    if problem := what_is_missing(listing):
        raise InputError(f"model {url}: {problem}; expected a model in transformers' format")
    folder = _folder(url, listing.revision)
    if folder.is_dir():
        return folder, listing.revision
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / ".lock"):
        if not folder.is_dir():
            _copy(listing, folder)
    return folder, listing.revision


def cached_copy(url: str, revision: str) -> Path | None:
    """Return the copy of that state on this machine, if there is one."""
    folder = _folder(url, revision)
    return folder if folder.is_dir() else None


def _copy(listing: S3Listing, folder: Path) -> None:
    """Copy all objects into a folder beside, renamed to `folder` when all are there and still as they were listed."""
    partial = folder.with_name(f".partial-{folder.name}")
    client = s3_client()
    bucket, prefix = _parts(listing.url)
    objects = {_inside(name, listing.url): each for name, each in listing.objects.items()}
    wanted = {name: each for name, each in objects.items() if not name.startswith(".")}
    needed = sum(each.size for each in wanted.values())
    partial.mkdir(exist_ok=True)
    held = sum(file.stat().st_size for file in partial.rglob("*") if file.is_file())
    if (free := shutil.disk_usage(partial).free) < needed - held:
        raise InputError(
            f"model {listing.url}: {(needed - held) / 1e9:.1f} GB are to be copied to {partial.parent}, "
            f"{free / 1e9:.1f} GB are free; make room, or set BIVLM_CACHE to a folder on another disk"
        )
    for name, each in wanted.items():
        path = partial / name
        if path.is_file() and path.stat().st_size == each.size:
            continue  # from an attempt that was cut short: a file gets its name when it is whole
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary_beside(path) as temporary, s3_trouble(_cannot_read(listing.url)):
            client.download_file(bucket, prefix + name, str(temporary))
            temporary.replace(path)
    if list_prefix(listing.url).revision != listing.revision:
        shutil.rmtree(partial)
        raise InputError(f"model {listing.url}: was changed while it was copied; it is found again as it is now")
    partial.rename(folder)


def _folder(url: str, revision: str) -> Path:
    """Return one place for each state of each URL, with the prefix's last part as its name, which people read."""
    place = digest([str(s3_client().meta.endpoint_url), url, revision])[:24]
    return cache_folder().absolute() / "models" / place / PurePosixPath(url.removeprefix(SCHEME)).name


def _inside(name: str, url: str) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or {"..", "."} & set(name.split("/")) or "\\" in name or not name.isprintable():
        raise InputError(f"model {url}: the object {name!r} has a name that leads out of a folder")
    return name


def _parts(url: str) -> tuple[str, str]:
    bucket, _, prefix = url.removeprefix(SCHEME).partition("/")
    return bucket, f"{prefix.rstrip('/')}/" if prefix.strip("/") else ""


def _pages(url: str, **request: Any) -> Any:
    with s3_trouble(_cannot_read(url)):
        yield from s3_client().get_paginator("list_objects_v2").paginate(**request)


def _cannot_read(url: str) -> str:
    return f"model {without_credentials(url)}: cannot be read"
