"""The start of a worker process, and its end with the process that started it."""

from __future__ import annotations

import os
import signal
import threading
from multiprocessing.connection import Connection

import torch


def begin(lifeline: Connection, threads: int) -> None:
    """Make this process a worker that computes with at most `threads` threads and ends when `lifeline` is closed.

    Nobody writes to `lifeline`. Only the process that started this one holds its other end, so that it is closed when
    that process closes it or dies, however it dies; an executor of the standard library leaves its processes behind
    after SIGKILL. What was being written is left unfinished, which the workspace allows.
    """
    # Ctrl-C reaches all processes of a terminal. The flow decides what to make of it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(lifeline,), name="lifeline", daemon=True).start()
    # Several processes with as many threads each as there are cores would only get into each other's way.
    torch.set_num_threads(min(threads, torch.get_num_threads()))


def _end_with(lifeline: Connection) -> None:
    try:
        lifeline.recv_bytes()
    except (EOFError, OSError):
        os._exit(1)
