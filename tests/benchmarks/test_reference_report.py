"""Round-to-nearest is what its name says."""

import pytest
import torch
from torch import nn

from benchmarks.reference_model.report import quantize_plainly, round_to_nearest


def test_two_bits_leave_four_values_a_group_and_keep_its_ends():
    weight = torch.randn(3, 256, generator=torch.Generator().manual_seed(0))
    rounded = round_to_nearest(weight, bits=2, group=128)
    for row, kept in zip(weight.view(-1, 128), rounded.view(-1, 128), strict=True):
        levels = torch.linspace(row.min(), row.max(), 4)
        assert torch.allclose(kept.unique(), levels, atol=1e-5)
        assert torch.allclose((row[:, None] - levels).abs().amin(1), (row - kept).abs(), atol=1e-5)


def test_a_width_that_groups_do_not_divide_is_refused():
    with pytest.raises(ValueError, match="100 input features"):
        round_to_nearest(torch.zeros(2, 100), bits=2, group=128)


def test_the_head_keeps_its_weights():
    model = nn.ModuleDict({"proj": nn.Linear(128, 8), "lm_head": nn.Linear(128, 8)})
    before = {name: module.weight.detach().clone() for name, module in model.items()}
    assert quantize_plainly(model) == 128 * 8
    assert torch.equal(model["lm_head"].weight, before["lm_head"])
    assert not torch.equal(model["proj"].weight, before["proj"])
