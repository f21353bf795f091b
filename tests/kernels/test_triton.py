"""GPU kernels without a GPU: run by Triton's interpreter, and compiled for two generations of GPUs."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bivlm.kernels import gpu

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton cannot be imported")
NAMES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.uint8: "*u8",
    torch.uint16: "*u16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


def in_a_process(file, *options, **environment):
    """Run the tests of a file that is no test file; what they say of a failure is said."""
    file = str(Path(__file__).with_name(file))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options, file]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-5_000:]


@needs_triton
def test_products_in_the_interpreter():
    in_a_process("triton_products.py", TRITON_INTERPRET="1")


@needs_triton
def test_some_kernels_compile(tmp_path):
    in_a_process("triton_compiling.py", TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))


@needs_triton
@pytest.mark.slow
def test_every_kernel_compiles(tmp_path):
    in_a_process("triton_compiling.py", "-m", "slow", TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))


def test_a_cpu_is_no_gpu():
    assert not gpu.on_gpu(torch.device("cpu"))
    assert not gpu.on_gpu(torch.device("meta"))


@pytest.mark.parametrize(
    ("triton", "capability", "expected"), [(True, (9, 0), True), (True, (7, 5), False), (False, (9, 0), False)]
)
def test_which_gpus_multiply(monkeypatch, triton, capability, expected):
    monkeypatch.setattr(gpu, "_has_triton", lambda: triton)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    gpu._can_run.cache_clear()
    try:
        assert gpu.on_gpu(torch.device("cuda", 0)) is expected
    finally:
        gpu._can_run.cache_clear()


@pytest.mark.parametrize("steps", [1, 7, 128, 900, 20_000])
@pytest.mark.parametrize("programs", [1, 3, 128, 256, 5000])
def test_parts_of_columns(steps, programs):
    part = gpu.parts_of_columns(steps, 16, programs)
    assert part % 16 == 0 and part > 0
    parts = -(-steps // part)
    assert parts * programs <= max(256, programs) and (parts == 1 or programs < 256)
