"""What ran something: packages, processor, GPU. No names of machines, people or places."""

from __future__ import annotations

import platform
import subprocess
from functools import cache
from importlib import metadata
from pathlib import Path

import psutil
import torch

from bivlm.workspace.hashing import digest, file_digest

# What may change a byte or a figure. `software` names the first few, which touch weights.
_NUMERIC = ("bivlm", "torch", "numpy", "scipy")
_PACKAGES = (
    *_NUMERIC,
    "transformers",
    "tokenizers",
    "safetensors",
    "datasets",
    "pillow",
    "pandas",
    "pyarrow",
    "pydantic",
    "prefect",
    "mlflow",
    "boto3",
)
_ROOT = Path(__file__).parents[2]


@cache
def software() -> dict[str, str]:
    """Versions of what computes: short, because it stands in every step record."""
    return {"python": platform.python_version(), **{name: _version(name) for name in _NUMERIC}}


@cache
def packages() -> dict[str, str]:
    """Versions of Python and of every package that the pipeline builds on; those not installed are left out."""
    found = {name: _version(name) for name in _PACKAGES}
    return {"python": platform.python_version(), **{name: version for name, version in found.items() if version}}


@cache
def hardware() -> dict[str, str | int]:
    """Operating system, processor, cores, memory in bytes, GPU."""
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
    """Version of this package and the digest of its source files; commit and whether it was changed, in a git checkout.

    The digest is over what runs, wherever it was installed from: two installations with the same one are the same code.
    """
    files = {
        path.relative_to(_ROOT).as_posix(): file_digest(path)
        for floor in ("bivlm", "tasks", "flows")
        for path in sorted((_ROOT / floor).rglob("*"))
        if path.suffix in (".py", ".yaml", ".html")
    }
    found: dict[str, str | bool] = {"version": _version("bivlm"), "sha256": digest(files)}
    commit = _git("rev-parse", "HEAD")
    if commit is not None:
        found |= {"commit": commit, "changed": bool(_git("status", "--porcelain", "--untracked-files=no"))}
    return found


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return model or platform.processor() or platform.machine()


def _git(*arguments: str) -> str | None:
    """The answer of git if this package lies in a checkout of its own, not in somebody else's."""
    if not (_ROOT / ".git").exists():
        return None
    try:
        answer = subprocess.run(["git", "-C", str(_ROOT), *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() if answer.returncode == 0 else None
