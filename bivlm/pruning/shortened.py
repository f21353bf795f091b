"""A sequence without its dropped tokens: what a layer computes on, and what everything around it still sees.

A layer gets the kept tokens alone, in their order, with their own positions. Its output is put back among the hidden
states as they were: dropped tokens keep their last ones, and are not attended to again. Rows that keep fewer tokens
than others of their batch begin with empty slots, which see themselves alone and are seen by no other.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch


@dataclass(frozen=True)
class Shortened:
    """The kept tokens of a batch of sequences.

    Attributes:
        alive_BT: bool (B, T), which tokens are kept; at least one in every row.
    """

    alive_BT: torch.Tensor

    @cached_property
    def length(self) -> int:
        """K, the most tokens that a row keeps."""
        return int(self.alive_BT.sum(1).max())

    @cached_property
    def places_BK(self) -> torch.Tensor:
        """Where the kept tokens stand, int64 (B, K); empty slots point to the first token."""
        order_BT = self.alive_BT.to(torch.int8).sort(dim=1, stable=True).indices  # kept ones last, in their order
        return order_BT[:, -self.length :].masked_fill(~self.filled_BK, 0)

    @cached_property
    def filled_BK(self) -> torch.Tensor:
        """Which slots hold a token, bool (B, K)."""
        slots = torch.arange(self.length, device=self.alive_BT.device)
        return slots >= self.length - self.alive_BT.sum(1, keepdim=True)

    @cached_property
    def full(self) -> bool:
        """Whether no row has an empty slot."""
        return bool(self.filled_BK.all())

    def take(self, tensor: torch.Tensor, dim: int = 1) -> torch.Tensor:
        """Return the kept entries along `dim`, of a tensor (B or 1, ..., T, ...) whose first dimension is the batch."""
        shape = list(tensor.shape)
        shape[0] = len(self.alive_BT)
        index_shape = [1] * tensor.dim()
        index_shape[0], index_shape[dim] = self.places_BK.shape
        shape[dim] = self.length
        return tensor.expand(len(self.alive_BT), *tensor.shape[1:]).gather(
            dim, self.places_BK.view(index_shape).expand(shape)
        )

    def put_back(self, short_BKD: torch.Tensor, whole_BTD: torch.Tensor) -> torch.Tensor:
        """Return `whole` with the kept tokens' rows replaced by those of `short`."""
        result = whole_BTD.clone()
        result[self.alive_BT] = short_BKD[self.filled_BK]
        return result

    def mask(self, mask: torch.Tensor | None, *, causal: bool) -> torch.Tensor | None:
        """Return the attention mask among kept tokens.

        `mask` is (B or 1, 1, T, T), additive or true where a token may look; (B, T) of ones and zeros; or None for all
        tokens, or with `causal` all before. None stays None where it can.
        """
        if mask is None:
            if self.full:
                return None
            seen_KK = torch.ones(self.length, self.length, dtype=torch.bool, device=self.alive_BT.device)
            seen_KK = seen_KK.tril() if causal else seen_KK
            return self._own(seen_KK[None, None] & self.filled_BK[:, None, None])
        if mask.dim() == 2:
            return self.take(mask) * self.filled_BK
        short = self.take(self.take(mask, 2), 3)
        if mask.dtype == torch.bool:
            return self._own(short & self.filled_BK[:, None, None])
        return short if self.full else short.masked_fill(~self._own(self.filled_BK[:, None, None]), _lowest(mask))

    def later_mask(self, mask: torch.Tensor | None, length: int, queries: int) -> torch.Tensor | None:
        """Return the mask of `queries` new tokens over the kept ones and all `length` after them, new ones included.

        `mask` is (B or 1, 1, Q, T + length), (B, T + length), or None.
        """
        if mask is None:
            if self.full and queries == 1:
                return None
            after = torch.ones(queries, length, dtype=torch.bool, device=self.alive_BT.device)
            after = after.tril(length - queries)[None, None].expand(len(self.alive_BT), 1, -1, -1)
            return torch.cat([self.filled_BK[:, None, None].expand(-1, 1, queries, -1), after], dim=-1)
        kept = self.take(mask[..., : self.alive_BT.shape[1]], mask.dim() - 1)
        filled = self.filled_BK if mask.dim() == 2 else self.filled_BK[:, None, None]
        lowest = 0 if mask.dtype == torch.bool or mask.dim() == 2 else _lowest(mask)
        after = mask[..., self.alive_BT.shape[1] :].expand(len(self.alive_BT), *mask.shape[1:-1], -1)
        return torch.cat([kept.masked_fill(~filled, lowest), after], dim=-1)

    def _own(self, seen: torch.Tensor) -> torch.Tensor:
        """Let every slot see itself: a row that sees nothing would give NaN."""
        return seen | torch.eye(self.length, dtype=torch.bool, device=seen.device)


def _lowest(mask: torch.Tensor) -> float:
    return torch.finfo(mask.dtype).min
