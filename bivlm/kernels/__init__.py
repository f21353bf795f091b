"""Native code, and what runs in its place where it was not built: `native.c` and others, plain C called through ctypes.

Every function here gives the same bytes either way: floating-point sums have a fixed order in both. Products with
packed weights are there natively or not at all. The extension is optional at installation; ``BIVLM_NATIVE=0`` in the
environment leaves it out.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

import numpy as np

from bivlm.errors import describe

_SWITCH = "BIVLM_NATIVE"
T = TypeVar("T")
_WORK = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_PART, _TOGETHER = 1 << 18, 4  # numbers, rows
_INTERFACE = 6  # of native.c


def switched_off() -> bool:
    """Return whether the environment leaves native code out."""
    return os.environ.get(_SWITCH) == "0"


@cache
def native() -> ctypes.CDLL | None:
    """Return the native library, or None where it was not built or is switched off.

    Warns of one that cannot be used.
    """
    found = importlib.util.find_spec("bivlm.kernels._native")
    if switched_off() or found is None or found.origin is None:
        return None
    try:
        library = ctypes.CDLL(found.origin)
        interface = library.bivlm_interface()
    except (OSError, AttributeError) as error:  # of another machine or C library, or of before there were numbers
        interface = describe(error)
    if interface == _INTERFACE:
        return library
    warnings.warn(
        f"{found.origin}: expected native code with interface {_INTERFACE}, found {interface}; it runs without, which "
        "takes longer. Install again to build it",
        stacklevel=2,
    )
    return None


def pointer(array: np.ndarray) -> ctypes.c_void_p:
    """Return the address of a contiguous array for a native function, which holds no reference to it."""
    if not array.flags.c_contiguous:
        raise ValueError(f"an array of strides {array.strides} for native code, expected a contiguous one")
    return ctypes.c_void_p(array.__array_interface__["data"][0])  # array.ctypes takes microseconds


def in_threads(function: Callable[..., T], *arguments: Sequence[int], threads: int) -> list[T]:
    """Return what a function, which releases the interpreter's lock, says of these arguments, as `map` does.

    The threads are torch's own where they can be had: after its work they wait busily for more, and would keep others
    from their cores.
    """
    if threads == 1 or len(arguments[0]) < 2:
        return list(map(function, *arguments))
    if (team := _team()) is None:
        return list(_pool(threads).map(function, *arguments))
    calls = list(zip(*arguments, strict=True))
    found: dict[int, T] = {}
    errors: list[BaseException] = []
    waiting = iter(range(len(calls)))

    def work(_: int | None) -> None:
        for number in waiting:
            try:
                found[number] = function(*calls[number])
            except BaseException as error:  # which has no way through the foreign code that called
                errors.append(error)

    team(_WORK(work), None, ctypes.c_uint(min(threads, len(calls))), ctypes.c_uint(0))
    if errors:
        raise errors[0]
    return [found[number] for number in range(len(calls))]


def _team() -> Callable[..., None] | None:
    """Return OpenMP's function that runs another in a team of threads, of the library that torch brings; None without.

    ``GOMP_parallel(function, data, threads, flags)`` is what gcc makes of ``#pragma omp parallel``.
    """
    try:
        return ctypes.CDLL(None).GOMP_parallel
    except (AttributeError, OSError, TypeError):  # no such library, or no such way to ask
        return None


def in_parts(function: Callable[[int, int], T], rows: int, numbers: int, threads: int) -> list[T]:
    """Return what `in_threads` does of the first row and the end of as many parts as are worth a thread.

    A part has a multiple of four rows, except the last.
    """
    parts = max(1, min(threads, numbers // _PART))
    cuts = [*range(0, rows, max(1, -(-rows // parts // _TOGETHER)) * _TOGETHER), rows]
    return in_threads(function, cuts[:-1], cuts[1:], threads=threads)


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "bivlm-native")


def feed_rows(rest_NT: np.ndarray, shares_BN: np.ndarray, errors_BT: np.ndarray) -> None:
    """Subtract ``shares^T errors`` from `rest` in place, one row of errors after the other; all float32.

    The order of the sum is that of the rows, whatever runs it. Rows may lie apart, each in one piece.
    """
    library = native()
    if library is None:
        product_NT = np.empty(rest_NT.shape, np.float32)
        for share_N, error_T in zip(shares_BN, errors_BT, strict=True):
            np.multiply(share_N[:, None], error_T, out=product_NT)
            np.subtract(rest_NT, product_NT, out=rest_NT)
        return
    arrays = (*_rows(rest_NT), *_rows(shares_BN), *_rows(errors_BT))
    library.bivlm_feed_rows(*arrays, *map(ctypes.c_int64, (len(rest_NT), len(shares_BN), rest_NT.shape[1])))


def _rows(array: np.ndarray) -> tuple[ctypes.c_void_p, ctypes.c_int64]:
    """Return an array's address, and how many numbers a row begins after the one before."""
    return ctypes.c_void_p(array.ctypes.data), ctypes.c_int64(array.strides[0] // array.itemsize)
