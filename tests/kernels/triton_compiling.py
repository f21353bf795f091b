"""GPU kernels compiled as a product would start them; no GPU is needed. `test_triton.py` starts this file.

``python tests/kernels/triton_compiling.py`` prints what each takes: registers, stack, shared memory, loads.
"""

import re
import subprocess
from collections import Counter
from itertools import product
from pathlib import Path

import pytest
import torch
import triton
from packed_weights import grouped_weight, quantile_weight, trellis_weight
from test_triton import NAMES
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bivlm.kernels import triton_planes, triton_trellis
from bivlm.packing import open_packed

WEIGHTS = {
    "1 group": lambda: quantile_weight(64, 512, 1),
    "2 groups": lambda: quantile_weight(64, 512, 2),
    "2 groups, salient": lambda: quantile_weight(64, 512, 2, 2, 0.02),
    "5 groups": lambda: quantile_weight(64, 512, 5),
    "5 groups, many salient": lambda: quantile_weight(64, 512, 5, 1, 0.5),
    **{f"{bits} bits": lambda bits=bits: grouped_weight(64, 512, bits, 128) for bits in (2, 3, 4, 8)},
    "trellis 2.0": lambda: trellis_weight(256, 64, 2.0, 1),
    "trellis 1.5": lambda: trellis_weight(256, 64, 1.5, 1),
    "trellis 3.0": lambda: trellis_weight(256, 64, 3.0, 1),
    "trellis 2.0, both sides": lambda: trellis_weight(64, 64, 2.0, 2),
    "trellis 2.0, few rows": lambda: trellis_weight(20, 64, 2.0, 1),
}
DEFAULT = {
    ("2 groups, salient", 1),
    ("2 groups", 64),
    ("3 bits", 4),
    ("trellis 2.0", 1),
    ("trellis 2.0, both sides", 1),
}
TOKENS = (1, 4, 16, 64)
GENERATIONS = (80, 90)
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class Kernel:
    """Stands in a kernel's place and notes how it would be started."""

    def __init__(self, function):
        self.function = function
        self.options, self.source = {}, None

    def __getitem__(self, grid):
        assert all(0 < size < 65536 for size in grid)
        return self.start

    def start(self, *arguments, num_warps=4, num_stages=3, **constants):
        self.options = {"num_warps": num_warps, "num_stages": num_stages}
        kinds = {}
        for name, value in zip(self.function.arg_names, arguments, strict=False):
            if value is None:
                constants[name] = None
            elif isinstance(value, torch.Tensor):
                kinds[name] = NAMES[value.dtype]
            else:
                kinds[name] = "fp32" if isinstance(value, float) else "i32"
        signature = {name: kinds.get(name, "constexpr") for name in self.function.arg_names}
        self.source = ASTSource(fn=self.function, signature=signature, constexprs=constants)


def compiled(weight, tokens, generation, dtype=torch.bfloat16):
    """Return the kernel that this many tokens would be multiplied by."""
    packed = WEIGHTS[weight]()
    module, names = (
        (triton_trellis, ["_by_columns", "_by_lines"]) if "trellis" in weight else (triton_planes, ["_product"])
    )
    with pytest.MonkeyPatch.context() as patch:
        kernels = [Kernel(getattr(module, name)) for name in names]
        for name, kernel in zip(names, kernels, strict=True):
            patch.setattr(module, name, kernel)
        codec, header = open_packed(packed)
        codec.gpu_product(packed, header, codec.side_table(packed, header))(
            torch.zeros(tokens, header.shape[1], dtype=dtype)
        )
    kernel = next(each for each in kernels if each.source)
    return triton.compile(kernel.source, target=GPUTarget("cuda", generation, 32), options=kernel.options)


def resources(cubin, folder):
    """Return registers of a thread and bytes of its stack."""
    file = folder / "kernel.cubin"
    file.write_bytes(cubin)
    said = subprocess.run([CUOBJDUMP, "--dump-resource-usage", file], capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", said).groups()
    return int(registers), int(stack)


def check(weight, tokens, generation, folder):
    kernel = compiled(weight, tokens, generation)
    assert kernel.asm["cubin"].startswith(b"\x7fELF")
    _, stack = resources(kernel.asm["cubin"], folder)
    assert stack <= 64  # more are numbers that found no register
    assert kernel.metadata.shared <= 48 << 10


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize(("weight", "tokens"), sorted(DEFAULT))
def test_a_kernel_compiles(weight, tokens, generation, tmp_path):
    check(weight, tokens, generation, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize(("weight", "tokens"), [each for each in product(WEIGHTS, TOKENS) if each not in DEFAULT])
def test_every_kernel_compiles(weight, tokens, generation, tmp_path):
    check(weight, tokens, generation, tmp_path)


def main():
    """Print a line for every kernel."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        for weight, tokens, generation in product(WEIGHTS, TOKENS, GENERATIONS):
            kernel = compiled(weight, tokens, generation)
            registers, stack = resources(kernel.asm["cubin"], Path(folder))
            memory = Counter(re.findall(r"\b((?:ld|st)\.(?:global|shared|local)[.\w]*)", kernel.asm["ptx"]))
            matrix = sum(len(re.findall(name, kernel.asm["ptx"])) for name in (r"mma\.sync", r"wgmma\.mma_async"))
            print(
                f"sm_{generation} {weight:<24}{tokens:3} tokens: {registers:3} registers, {stack:3} B stack,", end=" "
            )
            print(f"{kernel.metadata.shared:6} B shared, {matrix:3} matrix instructions, {dict(memory)}", flush=True)


if __name__ == "__main__":
    main()
