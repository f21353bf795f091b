"""A store that is a prefix in an S3 bucket, with a cache folder on this machine.

Credentials, region and ``AWS_ENDPOINT_URL`` come from the environment, as boto3 reads them. Every object is put in one
request or one multipart upload, so that no reader ever sees a part of it.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import boto3
import botocore.exceptions
from boto3.exceptions import Boto3Error, RetriesExceededError, S3TransferFailedError, S3UploadFailedError
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from bivlm.addresses import without_credentials
from bivlm.errors import InputError, describe
from bivlm.names import check_address
from bivlm.workspace.stores.base import Entry, Store
from bivlm.workspace.stores.folder import temporary_beside
from bivlm.workspace.stores.location import cache_folder

ABSENT = {"404", "NoSuchKey", "NotFound"}
# What may be over in a moment: two writers at once, a server or a network in trouble.
_BUSY_STATUS = {408, 409, 425, 429, 500, 502, 503, 504}
_BUSY_CODES = {"SlowDown", "RequestTimeout", "OperationAborted", "InternalError", "ServiceUnavailable"}
_PASSING = (
    botocore.exceptions.HTTPClientError,
    botocore.exceptions.ConnectionError,
    botocore.exceptions.IncompleteReadError,
    botocore.exceptions.ChecksumError,
    RetriesExceededError,
    S3TransferFailedError,
    S3UploadFailedError,
)
_ELSEWHERE = "; set AWS_DEFAULT_REGION to the region of the bucket, and AWS_ENDPOINT_URL to the server itself"


class S3Refusal(OSError):
    """S3 refuses what worked before, for example because credentials have expired: no trouble of a model or recipe."""


class S3Store(Store):
    """Objects under ``s3://bucket/prefix/``; files are read through ``<cache folder>/s3/<hash of the url>/``."""

    def __init__(self, url: str) -> None:
        match = re.fullmatch(r"s3://([a-z0-9][a-z0-9.-]{1,61}[a-z0-9])(?:/(.*?))?/*", url)
        prefix = match[2] if match else None
        # Servers that keep objects as files would follow such a part, and boto3 an empty one.
        if match is None or (prefix and (not prefix.isprintable() or {"", ".", ".."} & set(prefix.split("/")))):
            raise InputError(
                f"workspace {without_credentials(url)!r}: not an S3 location; expected s3://bucket or "
                "s3://bucket/prefix, credentials by AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            )
        self._bucket = match[1]
        self._prefix = f"{prefix}/" if prefix else ""
        self.url = f"s3://{self._bucket}/{self._prefix}".rstrip("/")
        with s3_trouble(f"workspace {url}: bucket {self._bucket!r} cannot be opened"):
            self._client = s3_client()
            self._client.head_bucket(Bucket=self._bucket)
        # One URL means different buckets at different endpoints, so the endpoint is part of the cache's name.
        place = f"{self._client.meta.endpoint_url}|{self.url}"
        self._cache = cache_folder() / "s3" / hashlib.sha256(place.encode()).hexdigest()[:16]
        self._cache.mkdir(parents=True, exist_ok=True)

    @property
    def local(self) -> Path:
        return self._cache

    def put_file(self, name: str, path: Path) -> None:
        with self._trouble(name):
            self._client.upload_file(str(path), self._bucket, self._prefix + name)

    def put_bytes(self, name: str, data: bytes) -> None:
        with self._trouble(name):
            self._client.put_object(Bucket=self._bucket, Key=self._prefix + name, Body=data)

    def read_bytes(self, name: str) -> bytes | None:
        with self._trouble(name, absent=True):
            return self._client.get_object(Bucket=self._bucket, Key=self._prefix + name)["Body"].read()
        return None

    def entry(self, name: str) -> Entry | None:
        with self._trouble(name, absent=True):
            found = self._client.head_object(Bucket=self._bucket, Key=self._prefix + name)
            return Entry(name, found["ContentLength"], found["LastModified"].timestamp())
        return None

    def entries(self, folder: str) -> Iterator[Entry]:
        pages = self._client.get_paginator("list_objects_v2")
        listed = iter(pages.paginate(Bucket=self._bucket, Prefix=f"{self._prefix}{folder}/"))
        while True:
            with self._trouble(folder):  # not around the yield: what the caller meets there is not S3's
                page = next(listed, None)
            if page is None:
                return
            for found in page.get("Contents", ()):
                yield Entry(found["Key"].removeprefix(self._prefix), found["Size"], found["LastModified"].timestamp())

    def delete(self, name: str) -> None:
        with self._trouble(name):
            self._client.delete_object(Bucket=self._bucket, Key=self._prefix + name)
        (self._cache / name).unlink(missing_ok=True)

    def path(self, name: str, anew: bool = False) -> Path | None:
        size = self.size(name)
        if size is None:
            return None
        path = self._cache / name
        if not anew and _length(path) == size:
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        # Renamed over what is there, never removed first: others on this machine may be about to open it.
        with temporary_beside(path) as temporary, self._trouble(name, absent=True):
            self._client.download_file(self._bucket, self._prefix + name, str(temporary))
            temporary.replace(path)
            return path
        return None  # it was collected since it was looked at

    @contextmanager
    def _trouble(self, name: str, *, absent: bool = False) -> Iterator[None]:
        """Translate errors as `s3_trouble` does; with `absent` just end the block where there is no such object."""
        try:
            with s3_trouble(f"{self.url}/{name}", S3Refusal):
                yield
        except S3Refusal as error:
            if not (absent and isinstance(error.__cause__, ClientError) and error_code(error.__cause__) in ABSENT):
                raise


def s3_client() -> Any:
    """Return a client of the S3 server that the environment names.

    Raises `InputError` where it names none, or one that cannot be.
    """
    for variable in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"):
        check_address(os.environ.get(variable, ""), variable)
    # Servers other than AWS do not all know the newer trailing checksums; our own SHA-256 covers every read.
    config = Config(
        retries={"mode": "standard", "max_attempts": 5},
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        max_pool_connections=32,  # more than ask side by side; a connection that finds no room is opened anew each time
    )
    # A session of its own reads the environment as it is now; the shared one keeps the first it has seen.
    with s3_trouble("S3"):
        return boto3.Session().client("s3", config=config)


def _length(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None


@contextmanager
def s3_trouble(what: str, refusal: type[Exception] = InputError) -> Iterator[None]:
    """Raise what S3, or boto3 before it asks, refuses within the block as one line that begins with `what`.

    `refusal` for what stays as it is: no such bucket or object, no access, expired or missing credentials, another
    region, a name or an address that cannot be one. ConnectionError for what may be over in a moment, see `is_busy`.
    """
    try:
        yield
    except (ClientError, BotoCoreError, Boto3Error) as error:
        # After a failed upload boto3 has only words; what was refused is the exception that it was handling then.
        found = error.__context__ if isinstance(error, S3UploadFailedError) and error.__context__ else error
        kind = ConnectionError if is_busy(found) else refusal
        raise kind(f"{what}: {_reason(found)}") from found
    except RecursionError:
        # boto3 follows a redirect by asking for the bucket's region, and that request is redirected as well.
        raise refusal(f"{what}: S3 redirects every request (HTTP 301) and names no region{_ELSEWHERE}") from None
    except ValueError as error:
        if isinstance(error, InputError) or "endpoint" not in str(error).lower():
            raise
        raise InputError(f"{what}: {describe(error)}; expected AWS_ENDPOINT_URL as https://HOST") from error


def is_busy(error: BaseException) -> bool:
    """Return whether an exception of boto3 may be over soon: two writers at once, a server or network in trouble."""
    if isinstance(error, ClientError):
        return _status(error) in _BUSY_STATUS or error_code(error) in _BUSY_CODES
    return isinstance(error, _PASSING)


def _reason(error: BaseException) -> str:
    reason = " ".join(describe(error).split())  # some of boto3's have several lines
    return f"S3 answers HTTP {_status(error)}: {reason}{_way_out(error)}" if isinstance(error, ClientError) else reason


def _status(error: ClientError) -> int | None:
    return error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")


def _way_out(error: ClientError) -> str:
    code, headers = error_code(error), error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    region = headers.get("x-amz-bucket-region") or error.response.get("Error", {}).get("Region")
    if region and region != os.environ.get("AWS_DEFAULT_REGION"):
        return f"; the bucket is in the region {region}: set AWS_DEFAULT_REGION"
    if code in ("301", "PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException"):
        return _ELSEWHERE
    if code in ("ExpiredToken", "InvalidToken", "TokenRefreshRequired"):
        return "; renew the credentials"
    return ""


def error_code(error: ClientError) -> str:
    """Return S3's own word for it, or the HTTP status as text where the answer had no body."""
    return str(error.response.get("Error", {}).get("Code", ""))
