"""Runners in processes of their own: interrupted, killed, on clusters; what is left ends with the same bytes."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from prefect import flow, task

from bivlm.reference import CHECKPOINT
from bivlm.workspace.steps import StepRecord
from flows.cli.main import BAD_INPUT, DONE, FAILED
from flows.runners import Runner, started
from tasks.layers import Layer
from tasks.runtime.steps import StepResult
from tests.flows.running import Running
from tests.servers import PATIENCE, Server, free_port, s3_files, s3_server  # noqa: F401  fixtures

needs_dask = pytest.mark.skipif(importlib.util.find_spec("prefect_dask") is None, reason="bivlm[dask] is not installed")
needs_ray = pytest.mark.skipif(importlib.util.find_spec("prefect_ray") is None, reason="bivlm[ray] is not installed")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def new_reference(new_compression):
    """A function that makes a place to compress the reference model in, which keeps workers busy for some seconds."""

    def make(place: Path):
        compression = new_compression(place)
        compression.model = CHECKPOINT
        compression.recipe["evaluation"] = []
        return compression

    return make


@pytest.fixture
def of_reference(new_reference, tmp_path):
    return lambda name: new_reference(tmp_path / name)


@pytest.fixture(scope="module")
def expected(new_reference, tmp_path_factory):
    """What threads make of it."""
    compression = new_reference(tmp_path_factory.mktemp("threads"))
    compression.run()
    return compression.weights()


def start(compression, runner: str, *options: str, workspace: str = "", **environment: str) -> Running:
    place = workspace or str(compression.workspace)
    return Running(compression, place, compression.place / "log", "--runner", runner, *options, **environment)


def workers_of(run: Running) -> list[psutil.Process]:
    """Processes below the run that carry out chunks, by what spawned processes are started with."""
    found = psutil.Process(run.process.pid).children(recursive=True)
    return [process for process in found if "spawn_main" in " ".join(process.cmdline())]


def wait_for(what, run: Running):
    deadline = time.monotonic() + PATIENCE
    while not (found := what()):
        assert run.process.poll() is None, run.errors()
        assert time.monotonic() < deadline, run.errors()
        time.sleep(0.02)
    return found


def steps_in(folder: Path) -> int:
    return len(list((folder / "steps").glob("*.json")))


def assert_gone(processes: list[psutil.Process], seconds: float) -> None:
    _, alive = psutil.wait_procs(processes, timeout=seconds)
    assert alive == []


LOCAL = [
    "processes",
    pytest.param("dask", marks=needs_dask),
    pytest.param("ray", marks=needs_ray),
]


@pytest.mark.parametrize("runner", LOCAL)
def test_every_runner_ends_with_the_same_bytes(of_reference, expected, runner):
    compression = of_reference(runner)
    run = start(compression, runner, "--workers", "2")
    assert run.end() == DONE, run.errors()
    assert compression.weights() == expected
    rows = [
        line for line in run.errors().splitlines() if line.startswith(("statistics", "plan", "pack", "error curve"))
    ]
    assert len(rows) >= 4
    assert all("76/76" in row for row in rows[-4:]), run.errors()


@pytest.mark.parametrize("runner", LOCAL)
def test_methods_that_are_calibrated_do_too(new_compression, tmp_path, runner):
    """Blocks are run in the flow's process, their layers packed by workers."""
    weights = {}
    for name in ("threads", runner):
        compression = new_compression(tmp_path / name)
        compression.recipe["components"]["language"] = {"method": "gptq", "bits": 2, "group_size": 16}
        compression.recipe["evaluation"] = []
        run = start(compression, name, "--workers", "2")
        assert run.end() == DONE, run.errors()
        weights[name] = compression.weights()
    assert weights["threads"] == weights[runner]


@task
def count_threads(chunk, workspace):
    import torch

    record = StepRecord(identity={"stage": "x"}, figures={"threads": torch.get_num_threads()}, seconds=0)
    return {layer.name: StepResult(record, False) for layer in chunk}


@pytest.mark.parametrize("runner", LOCAL)
@pytest.mark.parametrize("workers", [1, 2])
def test_workers_share_the_cores(monkeypatch, runner, workers):
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        monkeypatch.delenv(variable, raising=False)
    chunk = [Layer("", "0", "0.weight", "vision", (2, 2), "0" * 64, {})]

    @flow
    def run():
        with started(Runner(runner, workers=workers)) as begun:
            ((_, steps),) = begun.carry_out(count_threads, [chunk], "")
        return steps["0"].record.figures["threads"]

    assert run() == max(1, os.cpu_count() // workers)


@pytest.mark.parametrize("runner", LOCAL)
@pytest.mark.parametrize("sent", ["SIGKILL", "Ctrl-C", "SIGTERM"])
def test_nothing_is_left_behind_and_the_next_run_goes_on(of_reference, expected, runner, sent):
    compression = of_reference(runner)
    run = start(compression, runner, "--workers", "2")
    wait_for(lambda: steps_in(compression.workspace) > 5, run)
    below = psutil.Process(run.process.pid).children(recursive=True)
    assert len(below) >= 2
    if sent == "SIGKILL":
        run.process.kill()  # the flow alone: nobody ends the workers for it
        run.process.wait()
    elif sent == "SIGTERM":
        run.process.terminate()
    else:
        os.killpg(run.process.pid, signal.SIGINT)  # as a terminal does
    begun = time.monotonic()
    assert_gone(below, seconds=180)  # agents of a Ray that nobody ends look now and then whether it is there
    print(f"{runner}, {sent}: gone after {time.monotonic() - begun:.1f} s")
    if sent != "SIGKILL":
        assert run.end() == FAILED
        assert "interrupted; run it again to go on from where it was" in run.errors()
    done = steps_in(compression.workspace)
    again = start(compression, runner, "--workers", "2")
    assert again.end() == DONE, again.errors()
    assert 5 < done < steps_in(compression.workspace)
    assert compression.weights() == expected


@pytest.mark.parametrize("runner", ["processes", pytest.param("dask", marks=needs_dask)])
def test_a_worker_that_is_killed_in_the_middle_costs_nothing_but_time(of_reference, expected, runner):
    compression = of_reference(runner)
    run = start(compression, runner, "--workers", "2")
    wait_for(lambda: steps_in(compression.workspace) > 5, run)
    victim = workers_of(run)[0]
    victim.kill()
    done = steps_in(compression.workspace)
    assert run.end() == DONE, run.errors()
    print(f"{runner}: killed after {done} of {steps_in(compression.workspace)} steps")
    assert done < 2 * 76
    assert compression.weights() == expected


@pytest.fixture
def dask_cluster(tmp_path):
    """A scheduler and two workers without anybody who starts them again: as on machines of their own."""
    program, port, servers = [sys.executable, "-m", "distributed.cli.dask_scheduler"], free_port(), []
    address = f"tcp://127.0.0.1:{port}"
    options = ["--host", "127.0.0.1", "--port", str(port), "--no-dashboard", "--no-show"]
    servers.append(Server([*program, *options], port, tmp_path / "scheduler.log").start())
    workers = []
    for number in (1, 2):
        # Each with a cache of its own, as another machine has.
        environment = os.environ | {"BIVLM_CACHE": str(tmp_path / f"cache-{number}")}
        options = ["--nthreads", "1", "--no-nanny", "--no-dashboard", "--local-directory", str(tmp_path)]
        command = [sys.executable, "-m", "distributed.cli.dask_worker", address, *options]
        with (tmp_path / f"worker-{number}.log").open("ab") as log:
            workers.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True))
    yield address, workers
    for worker in workers:
        worker.kill()
        worker.wait()
    servers[0].kill()


@needs_dask
def test_a_machine_of_a_cluster_dies_and_the_others_finish(of_reference, expected, s3_server, s3_files, dask_cluster):  # noqa: F811
    address, workers = dask_cluster
    compression = of_reference("cluster")
    own = {"MLFLOW_TRACKING_URI": f"sqlite:///{compression.workspace / 'mlflow.db'}"}
    run = start(compression, f"dask={address}", workspace="s3://bivlm/work", **own)
    wait_for(lambda: steps_in(s3_files / "work") > 5, run)
    workers[0].kill()
    done = steps_in(s3_files / "work")
    assert run.end() == DONE, run.errors()
    print(f"killed after {done} of {steps_in(s3_files / 'work')} steps")
    assert done < 2 * 76
    assert compression.weights() == expected


@needs_dask
def test_a_cluster_that_cannot_work_is_named_with_what_is_missing(of_reference):
    compression = of_reference("cluster")
    run = start(compression, "dask=tcp://192.0.2.1:8786", PREFECT_API_URL="", PREFECT_HOME=str(compression.place))
    assert run.end() == BAD_INPUT
    assert "set PREFECT_API_URL" in run.errors()
    quick = {"DASK_DISTRIBUTED__COMM__TIMEOUTS__CONNECT": "3s"}
    run = start(compression, f"dask=tcp://127.0.0.1:{free_port()}", **quick)
    assert run.end() == FAILED
    assert "no answer" in run.errors().splitlines()[-1]


@needs_ray
def test_a_running_ray_cluster_is_joined_and_left_as_it_was(of_reference, expected, tmp_path):
    program = str(Path(sys.executable).with_name("ray"))
    port = free_port()
    options = [
        "--head",
        "--port",
        str(port),
        "--num-cpus",
        "2",
        "--include-dashboard",
        "false",
        "--disable-usage-stats",
    ]
    head = subprocess.Popen(
        [program, "start", *options, "--block"],
        stdout=(tmp_path / "head.log").open("ab"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + PATIENCE
        while "Ray runtime started" not in (tmp_path / "head.log").read_text():
            assert time.monotonic() < deadline, (tmp_path / "head.log").read_text()
            time.sleep(0.2)
        compression = of_reference("cluster")
        run = start(compression, f"ray=127.0.0.1:{port}")
        assert run.end() == DONE, run.errors()
        assert compression.weights() == expected
        assert compression.report()["runner"] == "ray, a running cluster"
        assert head.poll() is None
    finally:
        for process in [*psutil.Process(head.pid).children(recursive=True), head]:
            process.kill()
        head.wait()
