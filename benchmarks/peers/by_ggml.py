"""Products of llama.cpp's own library with weights of two or four bits, for `benchmarks.products`.

The libraries are those of a build of llama.cpp for this machine, such as the one in the package llama-cpp-python
(``lib`` beside its modules). Weights are held as llama.cpp holds them on a CPU: repacked where it has kernels for that.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from itertools import cycle
from pathlib import Path

import numpy as np

# Blocks of 256 weights: the type's number in ggml.h, bytes, and where the float16 scales and minima are.
TYPES = {"Q2_K": (10, 84, 80), "Q4_K": (12, 144, 0)}
_FLOAT32 = 0
_REPACKED = "_Z35ggml_backend_cpu_repack_buffer_typev"
_POINTERS = [
    "ggml_init",
    "ggml_new_tensor_2d",
    "ggml_mul_mat",
    "ggml_new_graph",
    "ggml_backend_buft_alloc_buffer",
    "ggml_backend_buffer_get_base",
    "ggml_backend_cpu_buffer_type",
    "ggml_backend_cpu_init",
    _REPACKED,
]


class _Parameters(ctypes.Structure):
    """`ggml_init_params`."""

    _fields_ = (("size", ctypes.c_size_t), ("memory", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


class Ggml:
    """llama.cpp's library in a folder."""

    def __init__(self, folder: Path, threads: int) -> None:
        """Load it; raises OSError where it is not there."""
        self._parts = [ctypes.CDLL(str(folder / f"libggml-{part}.so"), ctypes.RTLD_GLOBAL) for part in ("base", "cpu")]
        self._backend = self._call("ggml_backend_cpu_init")
        self._call("ggml_backend_cpu_set_n_threads", self._backend, ctypes.c_int(threads))

    def products(self, kind: str, shape: tuple[int, int], tokens: int, copies: int) -> Callable[[], object]:
        """Return a product of random activations with one copy of a random weight after the other."""
        number, nbytes, scales = TYPES[kind]
        (rows, columns), rng = shape, np.random.default_rng(0)
        if columns % 256:
            raise ValueError(f"a weight of {columns} columns, expected a multiple of 256")
        blocks = rng.integers(0, 256, (rows * columns // 256, nbytes), dtype=np.uint8)
        blocks[:, scales : scales + 4] = np.array([0.01, 0.01], np.float16).view(np.uint8)
        x_TN = rng.standard_normal((tokens, columns), dtype=np.float32)
        repacked = self._call(_REPACKED)
        plain = self._call("ggml_backend_cpu_buffer_type")
        graphs = []
        for _ in range(copies):
            context = self._call("ggml_init", _Parameters(1 << 20, None, True))
            weight = self._tensor(context, number, columns, rows, repacked, blocks)
            inputs = self._tensor(context, _FLOAT32, columns, tokens, plain, x_TN)
            outputs = self._call("ggml_mul_mat", context, weight, inputs)
            self._allocate(outputs, plain, 4 * rows * tokens)
            graph = self._call("ggml_new_graph", context)
            self._call("ggml_build_forward_expand", graph, outputs)
            graphs.append(graph)
        turns = cycle(graphs)
        return lambda: self._call("ggml_backend_graph_compute", self._backend, next(turns))

    def _tensor(
        self, context: ctypes.c_void_p, kind: int, columns: int, rows: int, where: ctypes.c_void_p, content: np.ndarray
    ) -> ctypes.c_void_p:
        sizes = map(ctypes.c_int64, (columns, rows))
        tensor = self._call("ggml_new_tensor_2d", context, ctypes.c_int(kind), *sizes)
        self._allocate(tensor, where, content.nbytes)
        at = ctypes.c_void_p(content.ctypes.data)
        self._call("ggml_backend_tensor_set", tensor, at, ctypes.c_size_t(0), ctypes.c_size_t(content.nbytes))
        return tensor

    def _allocate(self, tensor: ctypes.c_void_p, where: ctypes.c_void_p, nbytes: int) -> None:
        buffer = self._call("ggml_backend_buft_alloc_buffer", where, ctypes.c_size_t(nbytes + 4096))
        self._call("ggml_backend_tensor_alloc", buffer, tensor, self._call("ggml_backend_buffer_get_base", buffer))

    def _call(self, name: str, *given: object) -> ctypes.c_void_p:
        function = next(getattr(part, name) for part in self._parts if hasattr(part, name))
        function.restype = ctypes.c_void_p if name in _POINTERS else ctypes.c_int
        found = function(*given)
        return ctypes.c_void_p(found) if name in _POINTERS else found
