"""The peak of this process's resident memory, in bytes."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

_CLEAR_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


def reset_peak() -> bool:
    """Let `peak_bytes` count from now; False where the system cannot do that and it counts from the process's start."""
    try:
        _CLEAR_REFS.write_text("5")  # 5 resets VmHWM, see proc_pid_clear_refs(5)
    except OSError:
        return False
    return True


def peak_bytes() -> int:
    """The largest resident size since the last `reset_peak`, or since the start of the process where there is none."""
    try:
        status = _STATUS.read_text()
    except OSError:
        status = ""
    for line in status.splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
