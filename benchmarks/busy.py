"""`bivlm compress` of the reference model beside processes that keep the machine busy: how it ends, and after how long.

    python -m benchmarks.busy [--processes 8] [--timeout MINUTES]

Prints one JSON object: exit code, seconds, load before and after, and the last line on stderr where the run failed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time

from bivlm.reference import CHECKPOINT

_BUSY = "while True: pass"


def main() -> int:
    """Measure once; returns 0 if the run was done, or ended with a sentence that names what failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.busy", description=__doc__.partition("\n")[0])
    parser.add_argument("--processes", type=int, default=8, metavar="N", help="busy processes (default: %(default)s)")
    parser.add_argument("--timeout", type=float, default=60, metavar="MINUTES", help="give up (default: %(default)s)")
    options = parser.parse_args()
    before = os.getloadavg()[0]
    busy = [subprocess.Popen([sys.executable, "-c", _BUSY]) for _ in range(options.processes)]
    try:
        with tempfile.TemporaryDirectory() as folder:
            found = _compress(folder, 60 * options.timeout)
    finally:
        for process in busy:
            process.kill()
            process.wait()
    found |= {"processes": options.processes, "cores": os.cpu_count(), "load_before": before}
    found["load_after"] = os.getloadavg()[0]
    print(json.dumps(found, indent=2))
    told = found["exit_code"] == 1 and found["said"].startswith("bivlm compress: failed: ")
    return 0 if found["exit_code"] == 0 or (told and not found["said"].endswith(": None")) else 1


def _compress(folder: str, seconds: float) -> dict[str, object]:
    command = [sys.executable, "-m", "flows.cli", "compress", "--model", str(CHECKPOINT), "--recipe", "bivlm"]
    command += ["--output", f"{folder}/packed", "--workspace", f"{folder}/workspace", "--questions", "50"]
    own = {name: value for name, value in os.environ.items() if name != "PREFECT_API_URL"}
    own |= {"PREFECT_HOME": f"{folder}/prefect"}  # its first database is made meanwhile, as on a new machine
    started = time.perf_counter()
    done = subprocess.run(command, env=own, capture_output=True, text=True, timeout=seconds, check=False)
    lines = done.stderr.strip().splitlines()
    return {
        "exit_code": done.returncode,
        "seconds": round(time.perf_counter() - started),
        "said": lines[-1] if done.returncode and lines else "",
    }


if __name__ == "__main__":
    sys.exit(main())
