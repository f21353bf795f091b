"""Error and speed of the trellis: ``python -m benchmarks.trellis [--size 2048]``.

First the mean squared error of every shipped code on a Gaussian, relative to its variance, in sequences of 256. Then,
with and without native code, each in a process of its own, millions of weights a second of CPU time in one thread:
quantizing a square layer, reading the levels of its bits, and rebuilding the weight. The best of three; without native
code a smaller layer.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import torch

from bivlm import kernels
from bivlm.methods import method
from bivlm.methods.base import LayerPlan
from bivlm.numerics import trellis
from bivlm.numerics.input_statistics import SiteStatistics
from bivlm.numerics.trellis import RATES, STATE_BITS, levels_of, trellis_code
from bivlm.numerics.trellis_tiles import Tiles
from bivlm.packing import unpack

LENGTH, SEQUENCES = 256, 400
SMALL = 256  # columns and rows of the layer without native code
REPEATS = 3
T = TypeVar("T")


def errors() -> None:
    """Print the error of every code."""
    print("mean squared error on a unit Gaussian, by bits per weight")
    print(f"{'':<12}" + "".join(f"{rate:>8g}" for rate in RATES))
    for state_bits in STATE_BITS:
        found = []
        for rate in RATES:
            code = trellis_code(state_bits, rate)
            x = np.random.default_rng(0).standard_normal((SEQUENCES, LENGTH), dtype=np.float32)
            levels = levels_of(code.magnitudes)
            error = np.square(x - levels[trellis.search(x, code, levels)[1]]).mean() / np.square(x).mean()
            found.append(float(error))
        print(f"2^{state_bits} states " + "".join(f"{error:8.4f}" for error in found), flush=True)
    print(f"{'Shannon':<12}" + "".join(f"{4.0**-rate:8.4f}" for rate in RATES))


def speeds(size: int) -> None:
    """Print the speeds of this process."""
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(size, size, generator=generator) * 0.02).to(torch.bfloat16)
    x, s = (torch.randn(2 * size, size, generator=generator) for _ in range(2))
    inputs = SiteStatistics(x.T @ x, torch.zeros(size), torch.zeros(size), {"text": 2 * size}, None, s.T @ s)
    chosen = method("trellis")
    print(f"{'native code' if kernels.native() else 'numpy alone'}, {size} x {size}, M weights/s")
    packed = {}
    for feedback, rotate in (("none", "none"), ("none", "both"), ("inputs", "both"), ("both", "both")):
        settings = chosen.Settings.model_validate({"method": "trellis", "feedback": feedback, "rotate": rotate})
        parameters = settings.model_dump(mode="json", exclude={"method"})
        plan = LayerPlan(method="trellis", version=chosen.version, shape=(size, size), parameters=parameters)
        made = _say(
            f"quantizing, feedback {feedback}, rotated {rotate}",
            size,
            lambda plan=plan: chosen.quantize(weight, plan, inputs),
        )
        packed[f"feedback {feedback}, rotated {rotate}"] = made.packed
    code, lengths = trellis_code(12, 2.0), Tiles((size, size), 1).lengths
    stream = np.random.default_rng(0).integers(0, 256, size * size // 4, dtype=np.uint8)
    _say("reading levels", size, lambda: trellis.read(stream, lengths, code))
    for name, each in packed.items():
        _say(f"rebuilding, {name}", size, lambda each=each: unpack(each, check=False))


def _say(what: str, size: int, work: Callable[[], T]) -> T:
    """Print the speed of the best of some runs; return what the last one made."""
    seconds = []
    for _ in range(REPEATS):
        started = time.process_time()
        made = work()
        seconds.append(time.process_time() - started)
    print(f"  {what:<45}{size * size / min(seconds) / 1e6:>10.2f}", flush=True)
    return made


def main() -> None:
    """Print errors, then the speeds with and without native code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=2048, help="rows and columns of the layer")
    parser.add_argument("--speeds-alone", action="store_true", help="of this process")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.speeds_alone:
        speeds(given.size)
        return
    errors()
    for native, size in (("1", given.size), ("0", min(given.size, SMALL))):
        command = [sys.executable, "-m", "benchmarks.trellis", "--speeds-alone", "--size", str(size)]
        environment = os.environ | {"BIVLM_NATIVE": native, "OMP_NUM_THREADS": "1"}
        subprocess.run(command, check=True, env=environment)


if __name__ == "__main__":
    main()
