"""Bi-VLM written a second time, as the paper states it: dense float64 tensors, the whole layer at every step.

It shares no code with the package. Tests and benchmarks hold the package against it.
"""

import math

import torch
from scipy.optimize import minimize_scalar
from scipy.stats import norm


def masks(weight, p_sal, groups):
    """Boolean masks of the unsalient groups, lowest first, and of the salient weights: (4), (5), (6)."""
    mean, std = weight.mean().item(), weight.std(correction=0).item()
    p_uns = (1 - p_sal) / groups
    ends = [mean + std * norm.ppf((1 + k * p_uns) / 2) for k in range(1, groups + 1)]
    if p_sal == 0:
        ends[-1] = math.inf
    magnitude, lower, found = weight.abs(), -math.inf, []
    for end in ends:
        found.append((magnitude > lower) & (magnitude <= end))
        lower = end
    return found, magnitude > lower


def algorithm_1(weight, bits, alpha, iterations, refit):
    """Row-wise salient quantization of a matrix that is zero outside its salient weights; returns a * B."""
    inside = weight != 0
    b = torch.sign(weight)
    for _ in range(iterations):
        squares = (b * b).sum(1)
        a = torch.where(squares > 0, (weight * b).sum(1) / squares.clamp_min(1e-300), 0.0)
        b = torch.where(a[:, None] > 0, (weight / a[:, None].clamp_min(1e-300)).clamp(-1, 1), 0.0)
    nonzero = b[b != 0]
    mu, sigma = (nonzero.mean(), nonzero.std(correction=0)) if len(nonzero) else (0.0, 0.0)
    d = torch.linspace(-1, 1, 2**bits + 1, dtype=torch.float64)
    r = mu + sigma * torch.sign(d) * (alpha * torch.exp(d.abs()) - 1)
    centres = (r[:-1] + r[1:]) / 2
    b = torch.where(inside, centres[(b[..., None] - centres).abs().argmin(-1)], 0.0)
    if refit:
        squares = (b * b).sum(1)
        a = torch.where(squares > 0, (weight * b).sum(1) / squares.clamp_min(1e-300), 0.0)
    return a[:, None] * b


def quantize(weight, p_sal, groups, bits=2, alpha=1.4, iterations=10, refit=False):
    """Hybrid quantization of a float64 weight at one salient share (algorithms 1 and 2)."""
    unsalient, salient = masks(weight, p_sal, groups)
    rebuilt = algorithm_1(weight * salient, bits, alpha, iterations, refit)
    for mask in unsalient:
        if mask.any():
            scale = weight[mask].abs().mean()
            rebuilt = rebuilt + torch.where(mask, torch.where(weight >= 0, scale, -scale), 0.0)
    return rebuilt


def objective(weight, p_sal, groups, **settings):
    """J (20)."""
    return (((weight - quantize(weight, p_sal, groups, **settings)) ** 2).sum() / (weight**2).sum()).item()


def search(weight, p_max, groups, tolerance=1e-3, **settings):
    """Algorithm 3: the salient share with the least J; Brent's bounded method and both ends."""
    tried = {p: objective(weight, p, groups, **settings) for p in (0.0, p_max)}
    if p_max > 0:

        def visit(p):
            tried[float(p)] = objective(weight, float(p), groups, **settings)
            return tried[float(p)]

        minimize_scalar(visit, bounds=(0.0, p_max), method="bounded", options={"xatol": tolerance * p_max})
    return min(tried, key=lambda p: (tried[p], p))
