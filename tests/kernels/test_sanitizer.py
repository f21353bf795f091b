"""Native code under the sanitizers of addresses and of undefined behaviour, in a process of its own."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bivlm import kernels

ROOT = Path(__file__).resolve().parents[2]
TESTS = [
    "tests/numerics/test_hadamard.py",
    "tests/numerics/test_trellis.py",
    "tests/numerics/test_trellis_product.py",
    "tests/packing/test_plane_product.py",
    "tests/packing/test_words.py",
]
PLUGIN = """
import ctypes
from bivlm import kernels
library = ctypes.CDLL({library!r})
kernels.native = lambda: library
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(kernels.native() is None or shutil.which("gcc") is None, reason="needs native code, and gcc"),
]


def test_nothing_is_read_or_written_beside_arrays(tmp_path):
    library = tmp_path / "native.so"
    flags = ["-O1", "-g", "-ffp-contract=off", "-fvisibility=hidden", "-fPIC", "-shared"]
    sanitized = ["-fsanitize=address,undefined", "-fno-sanitize=alignment", "-fno-sanitize-recover=undefined"]
    sources = sorted(map(str, (ROOT / "bivlm/kernels").glob("*.c")))
    subprocess.run(["gcc", *flags, *sanitized, "-o", str(library), *sources], check=True)
    (tmp_path / "sanitized.py").write_text(PLUGIN.format(library=str(library)))
    asan = subprocess.run(["gcc", "-print-file-name=libasan.so"], check=True, capture_output=True, text=True).stdout
    environment = os.environ | {
        "LD_PRELOAD": asan.strip(),
        "ASAN_OPTIONS": "detect_leaks=0",
        "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "sanitized", "-m", "not slow", *TESTS]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
