"""What an installation holds: packages and megabytes of ``bivlm`` and of ``bivlm[pipeline]``.

    python -m benchmarks.core_size

Builds the wheel and installs it twice, each time into an empty environment, with the pinned versions. It takes minutes
and a few gigabytes, which it frees again.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
CONSTRAINTS = ROOT / "constraints.txt"
_BUILT_OF = ("bivlm", "flows", "tasks", "bivlm_command.py", "pyproject.toml", "README.md", "LICENSE")


@dataclass(frozen=True)
class Installed:
    """What lies in an environment, without pip: packages, files' bytes, and bytes without torch's own."""

    packages: frozenset[str]
    nbytes: int
    nbytes_without_torch: int

    def __str__(self) -> str:
        return (
            f"{len(self.packages):>4} packages {self.nbytes / 1e6:>7,.0f} MB, "
            f"{self.nbytes_without_torch / 1e6:>6,.0f} MB of them beside torch"
        )


def build_wheel(folder: Path) -> Path:
    """Build the wheel from a copy of the sources in `folder`, and return it."""
    source = folder / "source"
    source.mkdir(parents=True)
    for name in _BUILT_OF:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
        else:
            shutil.copyfile(ROOT / name, source / name)
    _run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, source)
    (wheel,) = folder.glob("bivlm-*.whl")
    return wheel


def install(wheel: Path, folder: Path, extra: str = "") -> Path:
    """Install the wheel, with an extra, into a new environment at `folder`; return the environment's Python."""
    _run(sys.executable, "-m", "venv", folder)
    python = folder / "bin" / "python"
    # torch first and pinned, so that nothing else pulls in another build of it.
    for wanted in ("torch", f"{wheel}[{extra}]" if extra else wheel):
        _run(python, "-m", "pip", "install", "--quiet", "--no-compile", "-c", CONSTRAINTS, wanted)
    return python


def installed(python: Path) -> Installed:
    """Count what is installed for this Python of an environment."""
    listed = _run(python, "-c", "from importlib import metadata as m; [print(d.name) for d in m.distributions()]")
    (places,) = python.parents[1].glob("lib/python*/site-packages")
    sizes = {
        place.name: sum(file.stat().st_size for file in place.rglob("*") if file.is_file()) if place.is_dir() else 0
        for place in places.iterdir()
        if not place.name.startswith("pip") and place.name != "__pycache__"
    }
    total = sum(sizes.values())
    return Installed(frozenset(listed.lower().split()) - {"pip"}, total, total - sizes["torch"])


def _run(*command: str | Path) -> str:
    # Packages of this environment are none of the new one.
    own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(list(map(str, command)), env=own, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}: {done.stderr.strip()}")
    return done.stdout


def main() -> None:
    """Print a line for each of the two."""
    with tempfile.TemporaryDirectory() as place:
        wheel = build_wheel(Path(place) / "wheel")
        for what, extra in (("bivlm", ""), ("bivlm[pipeline]", "pipeline")):
            print(f"{what:<16}{installed(install(wheel, Path(place) / what, extra))}", flush=True)


if __name__ == "__main__":
    main()
