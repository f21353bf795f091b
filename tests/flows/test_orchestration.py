"""What the flow asks of Prefect: retries, chunks after memory ran out, slots for the GPU."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from prefect import flow, task

from bivlm.errors import InputError
from bivlm.workspace.steps import StepRecord
from flows.layers import side_by_side
from flows.runners import Runner, started
from tasks.layers import Layer
from tasks.runtime.device import Device, gpu_slot
from tasks.runtime.policy import OVER_NETWORK
from tasks.runtime.steps import StepResult

NOW = {"retry_delay_seconds": 0, "retry_jitter_factor": None}


def failing(error, times):
    """A task that raises `error` so many times, and what it was called with."""
    calls = []

    @task(**(OVER_NETWORK | NOW))
    def work():
        calls.append(1)
        if len(calls) <= times:
            raise error

    @flow
    def run():
        work()

    return run, calls


def test_a_lost_connection_is_tried_again_until_it_holds():
    run, calls = failing(ConnectionResetError("reset"), times=2)
    run()
    assert len(calls) == 3


def test_a_connection_that_never_comes_back_ends_the_run():
    run, calls = failing(ConnectionResetError("reset"), times=1000)
    with pytest.raises(ConnectionResetError):
        run()
    assert len(calls) == 1 + OVER_NETWORK["retries"]


def test_bad_input_is_tried_once():
    run, calls = failing(InputError("groups: found 0"), times=1)
    with pytest.raises(InputError, match="groups"):
        run()
    assert len(calls) == 1


def layer(name, weights=1 << 18):
    return Layer("", name, "", "vision", (weights, 1), "", {})


def test_a_chunk_that_does_not_fit_is_done_in_smaller_ones():
    seen = []

    @task(**OVER_NETWORK)
    def stage(chunk, workspace):
        seen.append(len(chunk))
        if len(chunk) > 1:
            raise MemoryError
        return {item.name: StepResult(StepRecord(identity={"stage": "x"}, seconds=0), False) for item in chunk}

    @flow
    def run():
        with started(Runner("threads", workers=2)) as workers:
            return side_by_side(stage, [layer(str(i)) for i in range(3)], "", lambda: None, workers)

    assert set(run()) == {"0", "1", "2"}
    assert seen[:2] == [3, 3]
    assert sorted(seen) == [1, 1, 1, 2, 3, 3]


def test_a_layer_that_does_not_fit_alone_ends_the_run():
    @task(**OVER_NETWORK)
    def stage(chunk, workspace):
        raise MemoryError

    @flow
    def run():
        with started(Runner("threads", workers=2)) as workers:
            side_by_side(stage, [layer("0")], "", lambda: None, workers)

    with pytest.raises(MemoryError):
        run()


DEVICE = Device("cuda", "any GPU", "0")

HOLDER = """
import os, signal, sys
from tasks.runtime.device import Device, gpu_slot
with gpu_slot(Device("cuda", "any GPU", "0")):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_one_gpu_is_held_by_one_task_at_a_time(monkeypatch, tmp_path):
    monkeypatch.setenv("BIVLM_CACHE", str(tmp_path))
    inside, most = [], []
    lock = threading.Lock()

    def work():
        with gpu_slot(DEVICE):
            with lock:
                inside.append(1)
                most.append(len(inside))
            time.sleep(0.1)
            with lock:
                inside.pop()

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1, 1, 1]


def test_a_gpu_held_by_a_killed_run_is_free_at_once(monkeypatch, tmp_path):
    monkeypatch.setenv("BIVLM_CACHE", str(tmp_path))
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    )
    assert holder.stdout.readline() == b"held\n"
    taken = threading.Event()

    def wait():
        with gpu_slot(DEVICE):
            taken.set()

    thread = threading.Thread(target=wait)
    thread.start()
    assert not taken.wait(0.5)
    os.killpg(holder.pid, signal.SIGKILL)
    holder.wait()
    assert taken.wait(5)
    thread.join()
