"""What the tests of binary methods share: layers, and error feedback by normal equations in double precision.

What is computed here shares no code with the package.
"""

import numpy as np
import torch

from bivlm.compression.layer import pack_layer
from bivlm.methods import method
from bivlm.numerics.input_statistics import SiteStatistics
from bivlm.numerics.weight_statistics import LayerStatistics
from bivlm.packing import unpack

GENERATOR = np.random.default_rng


def site(moment, tokens=100):
    """Statistics of inputs with this second moment."""
    moment = torch.as_tensor(moment, dtype=torch.float32)
    zeros = torch.zeros(len(moment))
    return SiteStatistics(moment, zeros, zeros, {"text": tokens})


def compress(name, weight, moment, **settings):
    """The weight as the method called `name` stores it, float64, and the record of its packing."""
    chosen = method(name)
    parsed = chosen.Settings.model_validate({"method": name} | settings)
    plan = chosen.plan(LayerStatistics.measure(weight, chosen.tail_share(parsed)), parsed)
    packed, record = pack_layer(weight, plan, inputs=site(moment))
    return unpack(packed).double().numpy(), record


def correlated_moment(channels, seed, tokens=None):
    """``X^T X / T`` of inputs of unequal size that have few directions in common, float64 (channels, channels)."""
    random = GENERATOR(seed)
    directions = random.normal(size=(channels, channels)) / (1 + np.arange(channels))[:, None] ** 0.75
    x = random.normal(size=(tokens or 8 * channels, channels)) @ directions
    x *= np.exp(0.5 * random.normal(size=channels))
    return x.T @ x / len(x)


def moment_seen(channels, seen):
    """A second moment of "inputs", of "no token", of "few tokens", or with every other one of "dead channels"."""
    moment = correlated_moment(channels, seed=1, tokens=2 if seen == "few tokens" else None)
    if seen == "no token":
        moment[:] = 0
    if seen == "dead channels":
        moment[::2], moment[:, ::2] = 0, 0
    return moment


def trained_like(rows, columns, seed):
    """float32 weights with heavy tails, a mean, and a few large columns."""
    random = GENERATOR(seed)
    weight = 0.02 * random.standard_t(5, size=(rows, columns)) + 0.002
    weight[:, ::11] *= 3
    return torch.from_numpy(weight.astype(np.float32))


def damped(moment, damping):
    return moment + damping * np.diag(moment).mean() * np.eye(len(moment))


def factor_diagonal(moment):
    """The diagonal of U, ``U^T U = H^-1``: its squares lead the inverses of the trailing parts of H."""
    return np.array([np.linalg.inv(moment[j:, j:])[0, 0] for j in range(len(moment))]) ** 0.5


def quantize_blocks(weight, moment, block, quantize):
    """Blocks one after another, each of the weights that complete the layer best once those before are fixed.

    ``quantize(begin, columns)`` returns what (M, B) columns are rebuilt as.
    """
    rebuilt = np.zeros_like(weight)
    for begin in range(0, weight.shape[1], block):
        error = weight[:, :begin] - rebuilt[:, :begin]
        rest = weight[:, begin:] + error @ moment[:begin, begin:] @ np.linalg.inv(moment[begin:, begin:])
        rebuilt[:, begin : begin + block] = quantize(begin, rest[:, :block])
    return rebuilt


def eleven_bits(values):
    """Rounded to the significant bits that a stored number has."""
    mantissa, exponent = np.frexp(np.asarray(values, np.float64))
    return np.ldexp(np.round(mantissa * 2048) / 2048, exponent)


def output_error(weight, rebuilt, moment):
    """``tr(E H E^T) / tr(W H W^T)``."""
    error = weight - rebuilt
    return np.trace(error @ moment @ error.T) / np.trace(weight @ moment @ weight.T)


def sign_error(weight, moment):
    """The output error of ``mean(abs(w)) * sign(w)``, row by row."""
    return output_error(weight, np.abs(weight).mean(1, keepdims=True) * np.sign(weight), moment)


def agree(found, expected):
    """Whether two weights are the same but for the last stored bit and, at most, a few near-ties decided otherwise."""
    size = np.abs(expected).max()
    close = np.isclose(found, expected, rtol=2e-3, atol=1e-4 * size)
    return close.mean() > 0.99 and np.isclose(((found - expected) ** 2).sum(), 0, atol=1e-3 * (expected**2).sum())


def _gaussian(seed, shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# What it is, the weight, the largest error ``||W - W_rebuilt||^2 / ||W||^2`` that any of the methods may have.
DEGENERATE = [
    ("zeros", torch.zeros(4, 8), 0),
    ("a positive constant", torch.full((4, 9), 0.25), 1e-6),
    ("a negative constant", torch.full((5, 8), -0.25), 1e-6),
    ("one row", torch.linspace(-1, 1, 40)[None], 0.4),
    ("one column", torch.linspace(-1, 1, 41)[:, None], 0.4),
    ("one weight", torch.tensor([[0.3]]), 1e-4),
    ("a zero row", torch.cat([torch.zeros(1, 33), _gaussian(1, (3, 33))]), 0.4),
    ("a zero column", torch.cat([torch.zeros(6, 1), _gaussian(1, (6, 32))], dim=1), 0.4),
    ("one outlier", torch.cat([_gaussian(1, (3, 32)) * 1e-3, torch.eye(1, 32)]), 0.4),
    ("tiny weights", _gaussian(2, (4, 32)) * 1e-30, 0.4),
    ("subnormal weights", _gaussian(2, (4, 32)) * 1e-39, 0.5),
    ("huge weights", _gaussian(2, (4, 32)) * 1e30, 0.4),
]
