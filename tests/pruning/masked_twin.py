"""The same models told by masks alone not to look at dropped tokens: nothing is removed, nothing is cached.

Attention is written out in full; no code is shared with the package.
"""

import copy
from contextlib import contextmanager

import torch
from transformers import AttentionInterface

NAME = "masked-twin"


def attend(module, query, key, value, attention_mask, scaling=None, is_causal=None, **_):
    groups = query.shape[1] // key.shape[1]
    key, value = (each.repeat_interleave(groups, dim=1).double() for each in (key, value))
    logits = query.double() @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        logits = logits.masked_fill(~attention_mask, -1e30)
    elif attention_mask is not None:
        logits = logits + attention_mask.double()
    elif causal and "cross" not in type(module).__name__.lower():
        length = query.shape[2]
        logits = logits.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), -1e30)
    lost = module.twin_lost
    if lost is not None:
        if lost.shape[1] != key.shape[2]:  # one of the windows of a sequence
            begin = module.twin_begin
            module.twin_begin = (begin + key.shape[2]) % lost.shape[1]
            lost = lost[:, begin : begin + key.shape[2]]
        logits = logits.masked_fill(lost[:, None, None], -1e30)
    return (logits.softmax(-1) @ value).float().transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, attend)


@contextmanager
def masked(layers_lost):
    """Within this block each (layer, lost) of the list does not look at its lost keys, bool (B, K) or None."""
    modules = []
    for layer, lost in layers_lost:
        for module in layer.modules():
            if hasattr(getattr(module, "config", None), "_attn_implementation"):
                modules.append((module, module.config))
                module.config = copy.copy(module.config)
                module.config._attn_implementation = NAME
                module.twin_lost, module.twin_begin = lost, 0
    try:
        yield
    finally:
        for module, config in modules:
            module.config = config
