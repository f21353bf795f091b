"""The whole retry policy, in one place.

- Out of memory: retried with smaller chunks (or batches), see `smaller_after_out_of_memory`. A worker that was killed
  counts as out of memory, which is what the kernel kills for.
- Network, S3, tracking server: retried a few times with growing, jittered pauses (`OVER_NETWORK`).
- Bad input, a gate that was not passed, and anything else: never retried; repetition does not change them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import botocore.exceptions
import httpx  # Prefect's
import httpx2  # the hub's
import requests  # MLflow's
import torch
from boto3.exceptions import S3TransferFailedError, S3UploadFailedError
from prefect.cache_policies import NO_CACHE
from prefect.tasks import exponential_backoff

from bivlm.errors import GateNotPassed, InputError
from bivlm.workspace.stores.s3 import is_busy

T = TypeVar("T")

_CONNECTION = (
    ConnectionError,
    TimeoutError,
    requests.exceptions.ConnectionError,
    requests.exceptions.Timeout,
    httpx.TransportError,
    httpx2.TransportError,
    botocore.exceptions.ConnectionError,
    botocore.exceptions.HTTPClientError,
    S3TransferFailedError,
    S3UploadFailedError,
)
_BUSY = {408, 425, 429, 500, 502, 503, 504}
_MLFLOW_BUSY = {"TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED", "ABORTED", "RESOURCE_CONFLICT"}


class WorkerLost(RuntimeError):
    """A worker died at work, most likely killed by the kernel because memory ran out."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether memory ran out, on the machine or on its GPU, or is likely to have: see `WorkerLost`."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError | WorkerLost)


def is_passing(error: BaseException | None) -> bool:
    """Return whether `error`, or its cause, lies between machines and may pass."""
    while error is not None:
        if isinstance(error, InputError | GateNotPassed):
            return False
        if isinstance(error, S3UploadFailedError) and isinstance(error.__context__, botocore.exceptions.ClientError):
            error = error.__context__  # what it says in words only
        if isinstance(error, _CONNECTION) or _busy_answer(error):
            return True
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return False


def may_heal(task: Any, task_run: Any, state: Any) -> bool:
    """Answer Prefect's question after a failed task: should it run again?"""
    try:
        state.result()
    except BaseException as error:  # judged, and left in the state, which the flow raises from
        return is_passing(error)
    return False


# The workspace is the only cache: Prefect neither stores results nor looks for them.
_PLAIN: dict[str, Any] = {"cache_policy": NO_CACHE, "persist_result": False}
OVER_NETWORK: dict[str, Any] = _PLAIN | {
    "retries": 4,
    "retry_delay_seconds": exponential_backoff(backoff_factor=2),  # 2, 4, 8, 16 s
    "retry_jitter_factor": 0.5,
    "retry_condition_fn": may_heal,
}


def smaller_after_out_of_memory(work: Callable[[int], T], size: int) -> T:
    """Return ``work(size)``, with half the size each time memory runs out; raises what does not fit at size 1."""
    while True:
        try:
            return work(size)
        except (MemoryError, torch.OutOfMemoryError):
            if size <= 1:
                raise
        # Outside the except clause: the traceback holds the tensors of the failed attempt until it is left.
        size //= 2
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def halves(items: Sequence[T]) -> Iterator[Sequence[T]]:
    """Yield the two halves of a chunk that was too large."""
    middle = (len(items) + 1) // 2
    yield items[:middle]
    yield items[middle:]


def _busy_answer(error: BaseException) -> bool:
    if isinstance(error, botocore.exceptions.ClientError):
        return is_busy(error)
    if isinstance(error, requests.exceptions.HTTPError | httpx.HTTPStatusError | httpx2.HTTPStatusError):
        return error.response is not None and error.response.status_code in _BUSY
    # By name, so that tasks that do not track anything need not import MLflow; a locked SQLite file comes this way.
    if type(error).__name__ in {"MlflowException", "RestException"}:
        # Two runs write the same new row at once: the one that was refused finds it next time.
        taken = "unique constraint" in str(error).lower()
        return taken or getattr(error, "error_code", None) in _MLFLOW_BUSY
    return type(error).__name__ == "OperationalError" and "locked" in str(error)
