"""The random rotation in float64, from scipy's Hadamard matrices and numpy's random numbers."""

import numpy as np
from scipy.linalg import hadamard


def part_of(width):
    """The largest power of two that is not above the width."""
    return 1 << (width.bit_length() - 1)


def signs_of(width, seed):
    """The signs of all entries, and of the last p: the bits of 64-bit random numbers, lowest first."""
    generator, count = np.random.Generator(np.random.PCG64([seed, width])), width + part_of(width)
    words = [int(word) for word in generator.integers(0, 2**64 - 1, -(-count // 64), np.uint64, endpoint=True)]
    signs = np.array([-1.0 if words[at // 64] >> at % 64 & 1 else 1.0 for at in range(count)])
    return signs[:width], signs[width:]


def transformed(x):
    """The normalised Hadamard transform along the first axis, whose length is a power of two: H_ab is H_a x H_b."""
    few = part_of(int(len(x) ** 0.5))
    out = np.einsum("ia,abk->ibk", hadamard(few), x.reshape(few, len(x) // few, -1))
    out = np.einsum("jb,ibk->ijk", hadamard(len(x) // few), out)
    return out.reshape(x.shape) / len(x) ** 0.5


def turned(x, seed):
    """R x along the first axis of x (N, K)."""
    first, second = signs_of(len(x), seed)
    out, part = x * first[:, None], part_of(len(x))
    out[:part] = transformed(out[:part])
    if part < len(out):
        out[-part:] = transformed(out[-part:] * second[:, None])
    return out


def dense_rotation(width, seed):
    """R, float64 (N, N)."""
    return turned(np.eye(width), seed)
