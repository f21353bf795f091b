"""A prompt while it is read: its tokens, which of them are still there, and how those that stay are chosen."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from bivlm.pruning import selection
from bivlm.pruning.shortened import Shortened
from bivlm.recipe.pruning import PruningSettings


@dataclass
class Sequence:
    """Rows of tokens, of which some are candidates for being dropped.

    Attributes:
        candidates_BT: bool (B, T).
        alive_BT: bool (B, T); padding never is.
        seeds: of every row, for choices at random: the same row gives the same, whatever it is batched with. Empty
            where nothing is chosen at random.
        merged: neighbouring tokens that stay or go together.
    """

    candidates_BT: torch.Tensor
    alive_BT: torch.Tensor
    seeds: list[int]
    merged: int = 1
    _shortened: Shortened | None = field(default=None, repr=False)

    @property
    def shortened(self) -> Shortened | None:
        """What is left; None while nothing was dropped."""
        return self._shortened

    def drop(self, kept_BT: torch.Tensor) -> None:
        """Drop the tokens that are not among `kept`, bool (B, T)."""
        alive_BT = self.alive_BT & kept_BT
        if not torch.equal(alive_BT, self.alive_BT):
            self.alive_BT, self._shortened = alive_BT, Shortened(alive_BT)

    def choose(
        self,
        settings: PruningSettings,
        scores_BT: torch.Tensor | None,
        last: bool = True,
        diverse: Callable[[int, torch.Tensor, int], torch.Tensor] | None = None,
    ) -> tuple[int, int]:
        """Drop candidates as the settings say; returns how many there were and how many of them were kept.

        `last` says that one of a row's candidates has to stay.
        ``diverse(row, tokens, count)`` chooses `count` of the tokens at some places of a row by their features.
        """
        kept_BT, candidates_BT = self.alive_BT.clone(), self.candidates_BT & self.alive_BT
        for row in range(len(kept_BT)):
            places_n = candidates_BT[row].nonzero().view(-1)
            units_nu = places_n.view(-1, self.merged)
            n = len(units_nu)
            if n == 0:
                continue
            count = n if settings.share is None else selection.kept_count(n, settings.share, last)
            scores_n = None if scores_BT is None else scores_BT[row][units_nu].mean(1)
            if scores_n is not None and settings.mass is not None:
                kept_n = selection.by_mass(scores_n, settings.mass)
            elif scores_n is not None:
                kept_n = selection.highest(scores_n, count)
            elif settings.score == "random":
                seed = zlib.crc32(f"{settings.seed} {self.seeds[row]}".encode())
                kept_n = selection.at_random(n, count, seed, kept_BT.device)
            elif settings.score == "uniform":
                kept_n = selection.evenly(n, count, kept_BT.device)
            elif diverse is not None:
                kept_n = diverse(row, places_n, count)
            else:
                raise ValueError(f"score {settings.score!r} needs what it is computed from")
            kept_BT[row, units_nu[~kept_n].view(-1)] = False
        self.drop(kept_BT)
        return int(candidates_BT.sum()), int((candidates_BT & kept_BT).sum())


class Tally:
    """How many tokens there were to choose among, and how many of them were kept, by kind."""

    def __init__(self) -> None:
        self._counts: dict[str, tuple[int, int]] = {}

    def add(self, kind: str, counts: tuple[int, int]) -> None:
        """Count the tokens of one choice."""
        before = self._counts.get(kind, (0, 0))
        self._counts[kind] = before[0] + counts[0], before[1] + counts[1]

    def kept_shares(self) -> dict[str, float]:
        """Return the share of tokens that was kept, by kind; kinds without any are left out."""
        return {kind: kept / among for kind, (among, kept) in self._counts.items() if among}


def seed_of(content: torch.Tensor) -> int:
    """Return a checksum of integers or floating-point numbers."""
    return zlib.crc32(content.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
