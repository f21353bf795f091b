"""A virtual environment for each peer, with pinned packages."""

from __future__ import annotations

import subprocess
import venv
from pathlib import Path

TORCH = "torch==2.13.0"
# torchvision is left out: beside a CPU build of torch it cannot be imported.
PINS = {
    "auto-round": ("transformers==5.23.0", "auto-round==0.16.1"),
    # It takes transformers up to 5.17 only, and an older auto-round beside it.
    "llmcompressor": ("transformers==5.17.0", "llmcompressor==0.14.0.1", "compressed-tensors==0.19.0"),
    "hqq": ("transformers==5.23.0", "hqq==0.2.8.post1"),
}
MINUTES = 30


def version_of(peer: str) -> str:
    """Return the pinned version of the peer's own package."""
    return next(pin.partition("==")[2] for pin in PINS[peer] if pin.partition("==")[0] == peer)


def python_of(peer: str, folder: Path) -> Path:
    """Return the interpreter of the peer's environment in `folder`, which is made unless it has these pins already.

    Raises RuntimeError with the end of what pip says if it fails.
    """
    place = (folder / peer).absolute()
    python, stamp = place / "bin" / "python", place / "installed.txt"
    pins = "\n".join((TORCH, *PINS[peer])) + "\n"
    if not stamp.is_file() or stamp.read_text() != pins:
        venv.create(place, with_pip=True, clear=True)
        # torch comes first and pinned, so that nothing else pulls in another build of it.
        for wanted in ([TORCH], [TORCH, *PINS[peer]]):
            _install(python, wanted)
        stamp.write_text(pins)
    return python


def _install(python: Path, wanted: list[str]) -> None:
    command = [str(python), "-m", "pip", "install", "--quiet", *wanted]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60 * MINUTES)
    if done.returncode:
        raise RuntimeError(f"pip could not install {', '.join(wanted)}:\n{done.stderr[-2000:]}")
