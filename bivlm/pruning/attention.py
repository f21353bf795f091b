"""The attention that tokens receive in one layer, from its queries and keys, whatever kernel the model uses.

Only the layer that is looked at computes attention weights, in pieces; every layer stays on its fast kernel.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

See = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None, float, bool], None]

_NAME = "bivlm-observed"
_ATTRIBUTE = "_bivlm_observed"
_WEIGHTS_AT_ONCE = 1 << 24


@contextmanager
def observing(layer: nn.Module, see: See) -> Iterator[None]:
    """Call ``see(query, key, mask, scale, causal)`` within the block with what every attention in `layer` gets.

    Shapes are (B, H, Q, d), (B, H_kv, K, d), and the mask's, which is additive, or true where a query may look.
    """
    modules = [module for module in layer.modules() if hasattr(getattr(module, "config", None), "_attn_implementation")]
    before: list[Any] = [module.config for module in modules]
    for module, config in zip(modules, before, strict=True):
        own = copy.copy(config)
        own._attn_implementation = _NAME
        module.config = own
        setattr(module, _ATTRIBUTE, (config._attn_implementation, see))
    try:
        yield
    finally:
        for module, config in zip(modules, before, strict=True):
            module.config = config
            delattr(module, _ATTRIBUTE)


def received(
    query_BHQd: torch.Tensor,
    key_BhKd: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    causal: bool,
    counts_BQ: torch.Tensor,
) -> torch.Tensor:
    """Return the attention each key receives, float32 (B, K), summed over heads and queries weighted by `counts_BQ`.

    It is divided by the heads and the sum of the weights, so that it adds up to 1 over the keys of a row.
    """
    batch, heads, queries, _ = query_BHQd.shape
    keys = key_BhKd.shape[2]
    key_BHKd = key_BhKd.repeat_interleave(heads // key_BhKd.shape[1], dim=1).to(torch.float32)
    total_BK = query_BHQd.new_zeros(batch, keys, dtype=torch.float32)
    counts_BQ = counts_BQ.to(torch.float32)
    wanted = counts_BQ.any(0).nonzero().view(-1)  # of a last token that is one row
    step = max(1, _WEIGHTS_AT_ONCE // (batch * heads * keys))
    for rows in wanted.split(step):
        logits_BHQK = (query_BHQd[:, :, rows].to(torch.float32) @ key_BHKd.transpose(2, 3)) * scale
        if mask is not None:
            seen = mask[:, :, rows] if mask.shape[2] > 1 else mask
            seen = seen[..., :keys]
            if seen.dtype == torch.bool:
                logits_BHQK.masked_fill_(~seen, torch.finfo(torch.float32).min)
            else:
                logits_BHQK += seen
        elif causal and queries > 1:
            places = torch.arange(keys, device=rows.device)
            logits_BHQK.masked_fill_(places > rows[:, None], torch.finfo(torch.float32).min)
        weights_BQK = logits_BHQK.softmax(-1).sum(1)
        total_BK += (counts_BQ[:, rows, None] * weights_BQK).sum(1)
    return total_BK / (heads * counts_BQ.sum(1, keepdim=True).clamp(min=1e-30))


def _observed(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **further: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    implementation, see = getattr(module, _ATTRIBUTE)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    see(query, key, attention_mask, query.shape[-1] ** -0.5 if scaling is None else scaling, causal)
    # Eager attention is each architecture's own function; the fused kernel gives the same but for rounding.
    run = ALL_ATTENTION_FUNCTIONS.get(implementation) or ALL_ATTENTION_FUNCTIONS["sdpa"]
    return run(module, query, key, value, attention_mask, scaling=scaling, is_causal=is_causal, **further)


AttentionInterface.register(_NAME, _observed)
