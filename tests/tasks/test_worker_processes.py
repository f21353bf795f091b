"""A worker process ends with the process that started it, however that ends, and leaves Ctrl-C to it."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

PARENT = """
import multiprocessing, os, sys, time
import torch
from tasks.runtime.workers import begin

def work(lifeline, ready, threads):
    begin(lifeline, threads)
    ready.send((os.getpid(), torch.get_num_threads()))
    time.sleep(60)

if __name__ == "__main__":
    spawn = multiprocessing.get_context("spawn")
    theirs, ours = spawn.Pipe(duplex=False)
    ready, told = spawn.Pipe(duplex=False)
    for threads in (1, 9):
        spawn.Process(target=work, args=(theirs, told, threads)).start()
    print(*ready.recv(), *ready.recv(), flush=True)
    sys.stdin.read()
    ours.close()
    time.sleep(60)
"""


@pytest.mark.parametrize("how", ["killed", pytest.param("lets go", marks=pytest.mark.slow)])
def test_it_ends_with_its_lifeline(tmp_path, how):
    (tmp_path / "parent.py").write_text(PARENT)
    parent = subprocess.Popen(
        [sys.executable, str(tmp_path / "parent.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "2"},
        start_new_session=True,
    )
    first, threads, second, others = map(int, parent.stdout.readline().split())
    assert sorted([threads, others]) == [1, 2]  # as it is told, and no more than somebody has allowed
    workers = [psutil.Process(first), psutil.Process(second)]
    for worker in workers:
        worker.send_signal(signal.SIGINT)
    time.sleep(0.2)
    assert all(worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE for worker in workers)
    if how == "killed":
        parent.kill()
    else:
        parent.stdin.close()
    deadline = time.monotonic() + 10
    while any(worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    parent.kill()
    parent.wait()
