"""How long the package, the cheapest command and its help take to start: CPU seconds, the least of five processes.

    python -m benchmarks.start [PACKED]

PACKED is a packed checkpoint; without it the reference model is packed first.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import bivlm
from bivlm.checkpoint.reading import LINEAGE
from bivlm.reference import CHECKPOINT

RUNS = 5
COMMAND = [sys.executable, "-m", "flows.cli"]


def cpu_seconds(command: Sequence[str | Path]) -> float:
    """Return the least user and system time that a command took in `RUNS` runs."""
    return min(_once(command) for _ in range(RUNS))


def starts(packed: Path) -> dict[str, float]:
    """Return CPU seconds by what was started."""
    commands = {
        "import bivlm": [sys.executable, "-c", "import bivlm"],
        "bivlm --help": [*COMMAND, "--help"],
        "bivlm bits": [*COMMAND, "bits", packed],
        "bivlm lineage": [*COMMAND, "lineage", packed],
        "bivlm inspect": [*COMMAND, "inspect", "--model", packed],
    }
    if not (packed / LINEAGE).exists():
        del commands["bivlm lineage"]
    return {what: cpu_seconds(command) for what, command in commands.items()}


def _once(command: Sequence[str | Path]) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Print one line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packed", nargs="?", type=Path, metavar="PACKED")
    packed = parser.parse_args().packed
    with tempfile.TemporaryDirectory() as place:
        if packed is None:
            packed = Path(place) / "packed"
            bivlm.compress_model(CHECKPOINT, "rtn-w2g128", packed)
        for what, seconds in starts(packed).items():
            print(f"{what:<15}{seconds:6.2f} s")


if __name__ == "__main__":
    main()
