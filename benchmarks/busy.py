"""`bivlm compress` of the reference model beside processes that keep the machine busy: how it ends, and after how long.

    python -m benchmarks.busy [--processes 8] [--questions N] [--timeout MINUTES]

Prints one JSON object: exit code, seconds, load before and after, and the last line on stderr where the run failed.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bivlm.reference import CHECKPOINT

_BUSY = "while True: pass"


def main() -> int:
    """Measure once; returns 0 if the run was done, or ended with a sentence that names what failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.busy", description=__doc__.partition("\n")[0])
    parser.add_argument("--processes", type=int, default=8, metavar="N", help="busy processes (default: %(default)s)")
    parser.add_argument("--timeout", type=float, default=60, metavar="MINUTES", help="give up (default: %(default)s)")
    parser.add_argument(
        "--questions", type=int, default=50, metavar="N", help="of a benchmark, 0: none (default: %(default)s)"
    )
    options = parser.parse_args()
    before = os.getloadavg()[0]
    busy = [subprocess.Popen([sys.executable, "-c", _BUSY]) for _ in range(options.processes)]
    try:
        with tempfile.TemporaryDirectory() as folder:
            found = _compress(folder, 60 * options.timeout, options.questions)
    finally:
        for process in busy:
            process.kill()
            process.wait()
    found |= {"processes": options.processes, "cores": os.cpu_count(), "load_before": before}
    found["load_after"] = os.getloadavg()[0]
    print(json.dumps(found, indent=2))
    told = found["exit_code"] == 1 and found["said"].startswith("bivlm compress: failed: ")
    return 0 if found["exit_code"] == 0 or (told and not found["said"].endswith(": None")) else 1


def _compress(folder: str, seconds: float, questions: int) -> dict[str, object]:
    command = [sys.executable, "-m", "flows.cli", "compress", "--model", str(CHECKPOINT), "--recipe", "bivlm"]
    command += ["--output", f"{folder}/packed", "--workspace", f"{folder}/workspace"]
    command += ["--questions", str(questions)] if questions else ["--no-evaluate"]
    own = {name: value for name, value in os.environ.items() if name != "PREFECT_API_URL"}
    own |= {"PREFECT_HOME": f"{folder}/prefect"}  # its first database is made meanwhile, as on a new machine
    started = time.perf_counter()
    with Path(folder, "log").open("w+") as log:
        process = subprocess.Popen(command, env=own, stdout=subprocess.DEVNULL, stderr=log)
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)  # as Ctrl-C: it ends its server, too
            process.wait()
            code = None
        log.seek(0)
        lines = log.read().strip().splitlines()
    said = lines[-1] if code and lines else ""
    return {"exit_code": code, "seconds": round(time.perf_counter() - started), "said": said}


if __name__ == "__main__":
    sys.exit(main())
