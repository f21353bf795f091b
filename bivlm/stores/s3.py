"""A store that is a prefix in an S3 bucket, with a cache folder on this machine.

Credentials, region and ``AWS_ENDPOINT_URL`` come from the environment, as boto3 reads them. Every object is put in one
request or one multipart upload, so that no reader ever sees a part of it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
from boto3.exceptions import S3UploadFailedError
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from bivlm.addresses import without_credentials
from bivlm.errors import InputError
from bivlm.stores import Entry, Store
from bivlm.stores.folder import temporary_beside
from bivlm.stores.location import cache_folder

ABSENT = {"404", "NoSuchKey", "NotFound"}
REFUSED = {"403", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "NoSuchBucket"}


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
        try:
            self._client = s3_client()
            self._client.head_bucket(Bucket=self._bucket)
        except ClientError as error:
            if error_code(error) in ABSENT | REFUSED:
                raise InputError(f"workspace {url}: bucket {self._bucket!r} cannot be opened: {error}") from error
            raise
        except BotoCoreError as error:
            raise InputError(f"workspace {url}: {error}") from error
        # One URL means different buckets at different endpoints, so the endpoint is part of the cache's name.
        place = f"{self._client.meta.endpoint_url}|{self.url}"
        self._cache = cache_folder() / "s3" / hashlib.sha256(place.encode()).hexdigest()[:16]
        self._cache.mkdir(parents=True, exist_ok=True)

    @property
    def local(self) -> Path:
        return self._cache

    def put_file(self, name: str, path: Path) -> None:
        try:
            self._client.upload_file(str(path), self._bucket, self._prefix + name)
        except S3UploadFailedError as error:
            raise ConnectionError(f"{self.url}/{name}: {error}") from error

    def put_bytes(self, name: str, data: bytes) -> None:
        self._client.put_object(Bucket=self._bucket, Key=self._prefix + name, Body=data)

    def read_bytes(self, name: str) -> bytes | None:
        try:
            return self._client.get_object(Bucket=self._bucket, Key=self._prefix + name)["Body"].read()
        except ClientError as error:
            if error_code(error) in ABSENT:
                return None
            raise

    def entry(self, name: str) -> Entry | None:
        try:
            found = self._client.head_object(Bucket=self._bucket, Key=self._prefix + name)
        except ClientError as error:
            if error_code(error) in ABSENT:
                return None
            raise
        return Entry(name, found["ContentLength"], found["LastModified"].timestamp())

    def entries(self, folder: str) -> Iterator[Entry]:
        pages = self._client.get_paginator("list_objects_v2")
        for page in pages.paginate(Bucket=self._bucket, Prefix=f"{self._prefix}{folder}/"):
            for found in page.get("Contents", ()):
                yield Entry(found["Key"].removeprefix(self._prefix), found["Size"], found["LastModified"].timestamp())

    def delete(self, name: str) -> None:
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
        with temporary_beside(path) as temporary:
            try:
                self._client.download_file(self._bucket, self._prefix + name, str(temporary))
            except ClientError as error:
                if error_code(error) in ABSENT:  # it was collected since it was looked at
                    return None
                raise
            temporary.replace(path)
        return path


def s3_client() -> Any:
    """A client of the S3 server that the environment names; raises `BotoCoreError` where it names none."""
    # Servers other than AWS do not all know the newer trailing checksums; our own SHA-256 covers every read.
    config = Config(
        retries={"mode": "standard", "max_attempts": 5},
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        max_pool_connections=32,  # more than ask side by side; a connection that finds no room is opened anew each time
    )
    # A session of its own reads the environment as it is now; the shared one keeps the first it has seen.
    return boto3.Session().client("s3", config=config)


def _length(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None


def error_code(error: ClientError) -> str:
    return error.response["Error"]["Code"]
