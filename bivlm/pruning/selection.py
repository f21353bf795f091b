"""Choose which tokens of an image stay: by a score, by diversity, or as a control.

Everything here looks at one image (or one prompt's text) at a time: n tokens, of which `count` stay. Results are bool
(n,), and do not depend on what else is in the batch.
"""

from __future__ import annotations

import torch

from bivlm.errors import InputError


def kept_count(tokens: int, share: float, last: bool = True) -> int:
    """Return how many of `tokens` stay if `share` is dropped; raise `InputError` if none would and `last` needs one."""
    count = tokens - round(share * tokens)
    if tokens and not count and last:
        most = (tokens - 1) / tokens
        raise InputError(f"pruning.share {share:g} leaves none of {tokens} image tokens; expected at most {most:.6g}")
    return count


def highest(scores_n: torch.Tensor, count: int) -> torch.Tensor:
    """Return the tokens with the highest scores; of equal ones the first."""
    return _at(scores_n.argsort(descending=True, stable=True)[:count], len(scores_n))


def by_mass(scores_n: torch.Tensor, mass: float) -> torch.Tensor:
    """Return the fewest tokens that hold `mass` of the sum of all scores, at least one."""
    order = scores_n.argsort(descending=True, stable=True)
    held = scores_n[order].to(torch.float64).cumsum(0)
    if len(held) == 0:
        return torch.zeros(0, dtype=torch.bool, device=scores_n.device)
    count = int((held < mass * held[-1] * (1 - 1e-12)).sum()) + 1  # the sum rounds
    return _at(order[:count], len(scores_n))


def evenly(tokens: int, count: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Return `count` tokens at even distances."""
    places = ((torch.arange(count, dtype=torch.float64) + 0.5) * tokens / max(count, 1)).long()
    return _at(places, tokens).to(device)


def at_random(tokens: int, count: int, seed: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Return `count` tokens drawn without replacement."""
    order = torch.randperm(tokens, generator=torch.Generator().manual_seed(seed))
    return _at(order[:count], tokens).to(device)


def divprune(features_nD: torch.Tensor, count: int) -> torch.Tensor:
    """Choose tokens by greedy max-min diversity with cosine distances (DivPrune, arXiv 2503.02175, algorithm 1).

    The first token is the one whose nearest neighbour is farthest; each next one is the farthest from those taken so
    far. Holds n x n distances.
    """
    unit = torch.nn.functional.normalize(features_nD.to(torch.float32), dim=-1)
    distance_nn = 1 - unit @ unit.T
    nearest = distance_nn.clone().fill_diagonal_(torch.inf).amin(1)
    taken = torch.zeros(len(unit), dtype=torch.bool, device=unit.device)
    for number in range(count):
        token = int(nearest.masked_fill(taken, -torch.inf).argmax())
        taken[token] = True
        nearest = distance_nn[token].clone() if number == 0 else torch.minimum(nearest, distance_nn[token])
    return taken


def cdpruner(features_nD: torch.Tensor, relevance_n: torch.Tensor, count: int) -> torch.Tensor:
    """Choose the greedy maximum of a determinantal point process given relevance (CDPruner, arXiv 2506.10967).

    The kernel is ``L = diag(r) S diag(r)`` with S the cosine similarities of the features and r the relevance scaled to
    [0, 1]; tokens are added one by one where the determinant grows most, by the incremental Cholesky factorization of
    Chen et al., "Fast greedy MAP inference for determinantal point process", 2018.
    """
    unit = torch.nn.functional.normalize(features_nD.to(torch.float32), dim=-1)
    relevance_n = relevance_n.to(torch.float32)
    span = relevance_n.max() - relevance_n.min()
    scaled = (relevance_n - relevance_n.min() + 1e-6) / (span + 1e-6)
    gain_n = scaled.square()  # the diagonal of L
    factor_cn = torch.zeros(count, len(unit), device=unit.device)
    taken = torch.zeros(len(unit), dtype=torch.bool, device=unit.device)
    for number in range(count):
        token = int(gain_n.masked_fill(taken, -torch.inf).argmax())
        taken[token] = True
        row_n = scaled[token] * scaled * (unit @ unit[token])
        row_n = row_n - factor_cn[:number, token] @ factor_cn[:number]
        factor_cn[number] = row_n / gain_n[token].clamp(min=1e-12).sqrt()
        gain_n = gain_n - factor_cn[number].square()
    return taken


def relevance(features_nD: torch.Tensor, text_tD: torch.Tensor) -> torch.Tensor:
    """Return the cosine similarity of every token with the mean of the prompt's text embeddings, (n,)."""
    text_D = text_tD.to(torch.float32).mean(0, keepdim=True)
    return torch.nn.functional.cosine_similarity(features_nD.to(torch.float32), text_D, dim=-1)


def _at(places: torch.Tensor, tokens: int) -> torch.Tensor:
    kept = torch.zeros(tokens, dtype=torch.bool, device=places.device)
    kept[places] = True
    return kept
