"""Runners, which work on chunks of layers: threads, processes, or the workers of a Dask or Ray cluster.

Only records travel between the flow and its workers; weights, statistics and shards stay in the checkpoint and the
workspace. Work that is not done for many layers at once runs in the flow's own process, whatever the runner.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from bivlm.addresses import text_without_credentials
from bivlm.errors import InputError, describe

if TYPE_CHECKING:
    from prefect import Task
    from prefect.task_runners import TaskRunner

    from tasks.layers import Layer
    from tasks.runtime.steps import StepResult

RUNNERS = ("threads", "processes", "dask", "ray")
# Each worker holds one layer; more of them than cores would only add memory.
WORKERS = min(4, os.cpu_count() or 1)
_PACKAGES = {"dask": "prefect_dask", "ray": "prefect_ray"}
_ADDRESSES = {"dask": "DASK_SCHEDULER_ADDRESS", "ray": "RAY_ADDRESS"}  # what both projects call it
_HERE = {"localhost", "127.0.0.1", "::1"}
# What a future raises, by name because two of the packages are extras, when its worker is gone.
_LOST = {"BrokenProcessPool", "KilledWorker", "WorkerCrashedError", "OutOfMemoryError", "NodeDiedError"}
# Records alone pass through Ray's store, which would otherwise take a third of the memory.
_RAY_STORE_BYTES = 128 << 20


@dataclass(frozen=True)
class Runner:
    """A runner by name, with the address of a running cluster, or else the number of workers to start."""

    name: str = "threads"
    address: str | None = None
    workers: int = WORKERS

    @property
    def threads(self) -> int:
        """How many threads each worker computes with, so that all of them together have one per core."""
        return max(1, (os.cpu_count() or 1) // self.workers)

    @property
    def described(self) -> str:
        """The runner as reports name it, without a machine."""
        return f"{self.name}, a running cluster" if self.address else f"{self.name}, {self.workers} workers"

    def __str__(self) -> str:
        return f"{self.name}={self.address}" if self.address else self.name


def parse_runner(text: str = "threads", workers: int | None = None) -> Runner:
    """Return the runner named `text`: one of `RUNNERS`, or ``dask=ADDRESS`` or ``ray=ADDRESS`` of a running cluster.

    The default address is that of the environment, ``DASK_SCHEDULER_ADDRESS`` or ``RAY_ADDRESS``. Raises `InputError`
    for anything else, for an extra that is not installed, and for `workers` of a running cluster.
    """
    name, equals, address = text.partition("=")
    if name not in RUNNERS:
        raise InputError(f"runner {text!r}: expected one of {', '.join(RUNNERS)}, or dask=ADDRESS or ray=ADDRESS")
    if equals and (name not in _ADDRESSES or not address):
        raise InputError(f"runner {text!r}: expected an address after dask= or ray=, such as dask=tcp://HOST:8786")
    if workers is not None and workers < 1:
        raise InputError(f"workers {workers}: expected at least 1")
    if name in _PACKAGES and find_spec(_PACKAGES[name]) is None:
        package = _PACKAGES[name].replace("_", "-")
        raise InputError(f"runner {name}: {package} is not installed; pip install 'bivlm[{name}]'")
    if name in _ADDRESSES:
        address = address or os.environ.get(_ADDRESSES[name], "")
    if address and workers is not None:
        raise InputError(f"workers {workers}: the cluster at {address} has workers of its own; leave the number out")
    return Runner(name, address or None, workers or WORKERS)


@contextmanager
def started(runner: Runner) -> Iterator[Workers]:
    """Start the workers of `runner` for this block, inside a flow.

    Raises ConnectionError if the cluster at an address does not answer, `InputError` if it has no workers or could not
    reach Prefect's server.
    """
    if runner.name == "threads":
        from prefect.task_runners import ThreadPoolTaskRunner

        with ThreadPoolTaskRunner(max_workers=runner.workers) as pool:
            yield Workers(pool, runner.workers, in_process=True)
    elif runner.name == "processes":
        with _Processes(runner) as processes:
            yield processes
    else:
        _check_that_workers_reach_the_server(runner)
        with (_dask if runner.name == "dask" else _ray)(runner) as (pool, count):
            yield Workers(pool, count, elsewhere=runner.address is not None)


class Workers:
    """Workers that carry out chunks of layers side by side.

    Attributes:
        count: how many there are.
        in_process: whether the flow sees the progress that a task reports.
        elsewhere: whether they may be on other machines.
    """

    def __init__(self, pool: TaskRunner, count: int, *, in_process: bool = False, elsewhere: bool = False) -> None:
        self.count, self.in_process, self.elsewhere = count, in_process, elsewhere
        self._pool = pool

    def carry_out(
        self, stage: Task[..., dict[str, StepResult]], chunks: Sequence[list[Layer]], workspace: str
    ) -> Iterator[tuple[list[Layer], dict[str, StepResult] | BaseException]]:
        """Yield each chunk with its steps by layer, or with its error: `WorkerLost` if its worker is gone."""
        from prefect import unmapped

        with nullcontext() if self.in_process else _as_workers_see_it():
            futures = self._pool.map(stage, {"chunk": chunks, "workspace": unmapped(workspace)})
        for chunk, future in zip(chunks, futures, strict=True):
            yield chunk, _result(future, chunk)


class _Processes(Workers, AbstractContextManager):
    """Worker processes on this machine.

    A worker that is killed takes the others with it, and nobody can tell which chunk it worked on. What is left is
    done by half as many, until there is one, which is to blame for the first chunk that it leaves undone.
    """

    def __init__(self, runner: Runner) -> None:
        self.count, self.in_process, self.elsewhere = runner.workers, False, False
        self._threads = runner.threads

    def carry_out(
        self, stage: Task[..., dict[str, StepResult]], chunks: Sequence[list[Layer]], workspace: str
    ) -> Iterator[tuple[list[Layer], dict[str, StepResult] | BaseException]]:
        from tasks.runtime.policy import WorkerLost

        waiting = list(chunks)
        while waiting:
            lost = []
            for chunk, result in super().carry_out(stage, waiting, workspace):
                if isinstance(result, WorkerLost):
                    lost.append((chunk, result))
                else:
                    yield chunk, result
            if lost:
                self._end()
                blamed = [lost.pop(0)] if self.count == 1 or len(waiting) == 1 else []
                self.count = max(1, self.count // 2)
                self._begin()
                print(f"a worker was killed, most likely for its memory: going on with {self.count}", file=sys.stderr)
                yield from blamed
            waiting = [chunk for chunk, _ in lost]

    def _begin(self) -> None:
        from prefect.task_runners import ProcessPoolTaskRunner

        from tasks.runtime.workers import begin

        theirs, self._lifeline = multiprocessing.get_context("spawn").Pipe(duplex=False)
        arguments = (theirs, self._threads)
        self._pool = ProcessPoolTaskRunner(max_workers=self.count, initializer=begin, initargs=arguments)
        self._pool.__enter__()

    def _end(self) -> None:
        self._pool.__exit__(None, None, None)
        self._lifeline.close()

    def __enter__(self) -> _Processes:
        self._begin()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:  # nobody waits for what they are at
            self._lifeline.close()
        self._end()


def _result(future: Any, chunk: Sequence[Layer]) -> dict[str, StepResult] | BaseException:
    from tasks.runtime.policy import WorkerLost

    try:
        return future.result(raise_on_failure=False)
    except Exception as error:
        if type(error).__name__ not in _LOST:
            raise
        names = chunk[0].name if len(chunk) == 1 else f"{chunk[0].name} and {len(chunk) - 1} more"
        lost = WorkerLost(
            f"a worker was killed while it was at {names}, most likely because memory ran out; fewer workers need less "
            "(--workers 1)"
        )
        lost.__cause__ = error
        return lost


@contextmanager
def _as_workers_see_it() -> Iterator[None]:
    """Let tasks that are sent out in this block take along the server's address, and little else of their flow.

    A temporary server has an address, but no setting tells it. A flow travels by value; unpacking it imports all that
    it uses, MLflow included, which takes every worker seconds and memory.
    """
    from prefect import flow
    from prefect.context import FlowRunContext
    from prefect.settings import PREFECT_API_URL, temporary_settings

    context = FlowRunContext.get()
    slight = context.model_copy(update={"flow": flow(_nothing, name=context.flow.name)})
    with temporary_settings({PREFECT_API_URL: str(context.client.api_url)}), slight:
        yield


def _nothing() -> None:
    """Do nothing: a flow in name only."""


def _check_that_workers_reach_the_server(runner: Runner) -> None:
    from prefect.settings import PREFECT_API_URL

    if runner.address is None or PREFECT_API_URL.value():
        return
    address = runner.address if "://" in runner.address else f"//{runner.address}"
    if urlsplit(address).hostname not in _HERE:
        raise InputError(
            f"runner {runner}: its workers report to Prefect, and a temporary server cannot be reached from other "
            "machines; start one that can (prefect server start --host 0.0.0.0) and set PREFECT_API_URL"
        )


@contextmanager
def _dask(runner: Runner) -> Iterator[tuple[TaskRunner, int]]:
    """Yield a Dask cluster's runner and the number of chunks that it takes at once.

    Raises ConnectionError if no scheduler answers at the runner's address, `InputError` if it has no workers.
    """
    from prefect_dask import DaskTaskRunner

    if runner.address:
        pool = DaskTaskRunner(address=runner.address)
    else:
        of_our_own = {
            "n_workers": runner.workers,
            "threads_per_worker": 1,
            "dashboard_address": None,
            "memory_limit": 0,  # nothing is kept in a worker that it could spill
            "silence_logs": logging.CRITICAL,
            "env": _thread_variables(runner),
        }
        pool = DaskTaskRunner(cluster_kwargs=of_our_own)
    with pool:
        try:
            client = pool.client  # connects
        except (OSError, ValueError) as error:
            raise _no_answer(runner, error, "dask scheduler") from error
        yield pool, _checked(runner, sum(client.nthreads().values()) if runner.address else runner.workers)


@contextmanager
def _ray(runner: Runner) -> Iterator[tuple[TaskRunner, int]]:
    """Yield the same of a Ray cluster."""
    import ray
    from prefect_ray import RayTaskRunner

    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.CRITICAL}
    if runner.address is None:
        options |= {"num_cpus": runner.workers, "include_dashboard": False, "object_store_memory": _RAY_STORE_BYTES}
        options["runtime_env"] = {"env_vars": _thread_variables(runner)}
    with ExitStack() as stack:
        try:
            # Without "local" Ray would join any cluster that it finds on this machine.
            pool = stack.enter_context(RayTaskRunner(address=runner.address or "local", init_kwargs=options))
        except (OSError, ValueError) as error:
            raise _no_answer(runner, error, "ray start --head") from error
        yield pool, _checked(runner, int(ray.cluster_resources().get("CPU", 0)))


def _checked(runner: Runner, count: int) -> int:
    if count < 1:
        raise InputError(f"runner {runner}: the cluster has no workers; start some")
    return count


def _no_answer(runner: Runner, error: Exception, start: str) -> ConnectionError:
    shown = text_without_credentials(str(runner))
    return ConnectionError(
        f"runner {shown}: no answer ({describe(error)}); start it ({start}), or leave the address out"
    )


def _thread_variables(runner: Runner) -> dict[str, str]:
    """Return the variables that limit a worker's libraries to its threads; those that are set already are kept."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    return {name: os.environ.get(name) or str(runner.threads) for name in names}
