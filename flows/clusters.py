"""Dask and Ray: a cluster that is there, or one of this machine for the length of a run."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from bivlm.addresses import text_without_credentials
from bivlm.errors import InputError, describe

if TYPE_CHECKING:
    from prefect.task_runners import TaskRunner

    from flows.runners import Runner

# Records alone pass through Ray's store, which would otherwise take a third of the memory.
_RAY_STORE_BYTES = 128 << 20


@contextmanager
def dask(runner: Runner) -> Iterator[tuple[TaskRunner, int]]:
    """A Dask cluster's runner and the number of chunks that it takes at once.

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
            "env": _threads(runner),
        }
        pool = DaskTaskRunner(cluster_kwargs=of_our_own)
    with pool:
        try:
            client = pool.client  # connects
        except (OSError, ValueError) as error:
            raise _no_answer(runner, error, "dask scheduler") from error
        yield pool, _checked(runner, sum(client.nthreads().values()) if runner.address else runner.workers)


@contextmanager
def ray(runner: Runner) -> Iterator[tuple[TaskRunner, int]]:
    """As `dask`, of a Ray cluster."""
    import ray
    from prefect_ray import RayTaskRunner

    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.CRITICAL}
    if runner.address is None:
        options |= {"num_cpus": runner.workers, "include_dashboard": False, "object_store_memory": _RAY_STORE_BYTES}
        options["runtime_env"] = {"env_vars": _threads(runner)}
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


def _threads(runner: Runner) -> dict[str, str]:
    """The variables that tell a worker's libraries how many threads to compute with; what somebody has set is kept."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    return {name: os.environ.get(name) or str(runner.threads) for name in names}
