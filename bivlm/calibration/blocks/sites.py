"""Input statistics of a unit's linear layers, added up while samples run through it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from bivlm.numerics.input_statistics import SiteStatistics

Weigh = Callable[[str, torch.Tensor], torch.Tensor]


@dataclass
class _Sums:
    moment_NN: torch.Tensor
    sum_N: torch.Tensor
    magnitude_N: torch.Tensor
    weight: float = 0.0
    tokens: dict[str, int] = field(default_factory=lambda: {"image": 0, "text": 0})


class SiteObserver:
    """Finds out which linear layers read the same tensor, and adds up the statistics of that tensor.

    A site is called after the first of its layers. Sums are float32 whatever the model computes in.
    """

    def __init__(self, linears: dict[str, nn.Linear]) -> None:
        self._linears = linears
        self._sums: dict[str, _Sums] = {}
        self._leader: dict[str, str] = {}
        self._seen: list[tuple[torch.Tensor, str]] = []

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Record what the layers take in within the block."""
        hooks = [
            linear.register_forward_pre_hook(lambda _, arguments, name=name: self._take(name, arguments[0]))
            for name, linear in self._linears.items()
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def add(self, image_T: torch.Tensor, weigh: Weigh) -> None:
        """Add up what the layers took in since the last call: one sample.

        `image_T` says which of the sample's tokens stand for image patches; a site with another number of rows reads
        image features, as do all of vision, where it is empty. ``weigh(site, image)`` gives g^2, float32 (T,), of the
        site's tokens.
        """
        while self._seen:
            x, leader = self._seen.pop(0)
            x_TN = x.detach().reshape(-1, x.shape[-1]).to(torch.float32)
            image = image_T.to(x.device) if len(image_T) == len(x_TN) else x_TN.new_ones(len(x_TN), dtype=torch.bool)
            self._add(leader, x_TN, image, weigh(leader, image).to(x.device))

    def statistics(self) -> dict[str, SiteStatistics]:
        """Return the statistics by site. A layer that never saw a token is a site of its own, all zero."""
        for name, linear in self._linears.items():
            if name not in self._leader:
                self._leader[name] = name
                self._sums[name] = _empty(linear.in_features, linear.weight.device)
        return {leader: _mean(sums) for leader, sums in self._sums.items()}

    def site_of(self) -> dict[str, str]:
        """Return the site of every layer, by name, after `statistics`."""
        return {name: self._leader[name] for name in self._linears}

    def _take(self, name: str, x: torch.Tensor) -> None:
        # The tensors are held until the sample is through: no other can come to lie at their addresses.
        leader = next((leader for other, leader in self._seen if other is x), None)
        if leader is None:
            leader = name
            self._seen.append((x, leader))
        if self._leader.setdefault(name, leader) != leader:
            raise RuntimeError(f"{name} reads the input of {leader} now, and of {self._leader[name]} before")

    def _add(self, leader: str, x_TN: torch.Tensor, image_T: torch.Tensor, weight_T: torch.Tensor) -> None:
        if leader not in self._sums:  # checked first: sums that are not needed would take as much memory for a moment
            self._sums[leader] = _empty(x_TN.shape[1], x_TN.device)
        sums = self._sums[leader]
        weighted_TN = x_TN * weight_T[:, None]
        sums.moment_NN.addmm_(weighted_TN.T, x_TN)
        sums.sum_N += weighted_TN.sum(0)
        sums.magnitude_N += weighted_TN.abs_().sum(0)
        sums.weight += float(weight_T.sum(dtype=torch.float64))
        images = int(image_T.sum())
        sums.tokens["image"] += images
        sums.tokens["text"] += len(x_TN) - images


def uniform(_site: str, image_T: torch.Tensor) -> torch.Tensor:
    """Return g = 1 for every token: GPTQ's second moment."""
    return torch.ones(len(image_T))


def by_modality(image_weight: float) -> Weigh:
    """Return a `Weigh` with g^2 = `image_weight` for image tokens and 1 for text tokens.

    In a vision-language model image tokens outnumber text tokens, and each matters about ten times less (MBQ, VLMQ).
    """
    return lambda _, image_T: torch.where(image_T, image_weight, 1.0).to(torch.float32)


def _empty(channels: int, device: torch.device) -> _Sums:
    zeros = torch.zeros(channels, device=device)
    return _Sums(torch.zeros(channels, channels, device=device), zeros, zeros.clone())


def _mean(sums: _Sums) -> SiteStatistics:
    # In place: beside the sums there is no room for another set of the same size.
    if sums.weight > 0:
        for tensor in (sums.moment_NN, sums.sum_N, sums.magnitude_N):
            tensor /= sums.weight
        sums.weight = 1.0
    return SiteStatistics(sums.moment_NN, sums.sum_N, sums.magnitude_N, dict(sums.tokens))


def names_of(statistics: Sequence[str]) -> dict[str, str]:
    """Return a file name for every site, in order: module names may be long, and differ only in their ends."""
    return {site: f"site-{number:03d}.safetensors" for number, site in enumerate(statistics)}
