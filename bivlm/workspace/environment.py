"""The packages, processor, GPU and memory of this process. No names of machines, people or places."""

from __future__ import annotations

import platform
import resource
import subprocess
import sys
from contextlib import suppress
from functools import cache
from importlib import metadata
from pathlib import Path

import psutil

from bivlm.workspace.hashing import digest, file_digest

# What may change a byte or a figure. `software` names the first few, which touch weights.
_NUMERIC = ("bivlm", "torch", "numpy", "scipy")
_PACKAGES: tuple[str, ...] = (*_NUMERIC, "transformers", "tokenizers", "safetensors", "datasets", "pillow", "pandas")
_PACKAGES += ("pyarrow", "pydantic", "prefect", "mlflow", "boto3")
_ROOT = Path(__file__).parents[2]
_CLEAR_REFS, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


@cache
def software() -> dict[str, str]:
    """Return the versions of what computes: short, because every step record has them."""
    return {"python": platform.python_version(), **{name: _version(name) for name in _NUMERIC}}


@cache
def packages() -> dict[str, str]:
    """Return the versions of Python and of every installed package that the pipeline builds on."""
    found = {name: _version(name) for name in _PACKAGES}
    return {"python": platform.python_version(), **{name: version for name, version in found.items() if version}}


@cache
def hardware() -> dict[str, str | int]:
    """Return the operating system, processor, cores, memory in bytes and GPU."""
    import torch

    found: dict[str, str | int] = {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": psutil.cpu_count() or 1,
        "memory_bytes": psutil.virtual_memory().total,
    }
    if torch.cuda.is_available():
        found |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda or ""}
    return found


@cache
def code() -> dict[str, str | bool]:
    """Return the version of this package and the digest of its source files, and in a git checkout the commit.

    Two installations with the same digest run the same code, wherever they were installed from.
    """
    files = {
        path.relative_to(_ROOT).as_posix(): file_digest(path)
        for floor in ("bivlm", "tasks", "flows")
        for path in sorted((_ROOT / floor).rglob("*"))
        if path.suffix in (".py", ".yaml", ".html", ".jinja")
    }
    found: dict[str, str | bool] = {"version": _version("bivlm"), "sha256": digest(files)}
    commit = _git("rev-parse", "HEAD")
    if commit is not None:
        found |= {"commit": commit, "changed": bool(_git("status", "--porcelain", "--untracked-files=no"))}
    return found


def reset_peak() -> bool:
    """Let `peak_bytes` count from now; return False where the system cannot, and it counts from the process's start."""
    try:
        _CLEAR_REFS.write_text("5")  # 5 resets VmHWM, see proc_pid_clear_refs(5)
    except OSError:
        return False
    return True


def peak_bytes() -> int:
    """Return the largest resident size since the last `reset_peak`, or since the process began where there is none."""
    with suppress(OSError):
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name") and (model := line.partition(":")[2].strip()):
                return model
    return platform.processor() or platform.machine()


def _git(*arguments: str) -> str | None:
    """Return what git answers; None unless this package lies in a checkout of its own."""
    if not (_ROOT / ".git").exists():
        return None
    try:
        answer = subprocess.run(["git", "-C", str(_ROOT), *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() if answer.returncode == 0 else None
