"""A packed weight is a function of its numbers: others can be stored, and gradients are those of the weight."""

import pytest
import torch
from codec_checks import DTYPES, POOLS, pool

from bivlm.packing import open_packed, unpack

TUNABLE = [codec for codec in POOLS if codec != "top-byte"]  # which has no numbers
# Groups and blocks that end early, more rows than are rebuilt at once, one column.
SHAPES = ((48, 200), (601, 2000), (5, 1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("codec", TUNABLE)
def test_the_weight_as_a_function_of_its_numbers_is_the_unpacked_weight(codec, dtype):
    for packed in pool(codec, SHAPES, [dtype]):
        opener, header = open_packed(packed)
        opened = opener.tunable(packed, header)
        assert opened.parameters and torch.equal(opened.rebuild(opened.parameters).to(dtype), unpack(packed))
        assert torch.equal(opener.retuned(packed, header, opened.parameters), packed)


@pytest.mark.parametrize("codec", TUNABLE)
def test_other_numbers_are_stored(codec):
    """Each kind of them doubled alone and with the rest, which float16 holds exactly."""
    for packed in pool(codec, SHAPES[:1], [torch.float32]):
        opener, header = open_packed(packed)
        opened = opener.tunable(packed, header)
        for names in [[name] for name in opened.parameters] + [list(opened.parameters)]:
            others = opened.parameters | {name: 2 * opened.parameters[name] for name in names}
            stored = opener.retuned(packed, header, others)
            assert stored.numel() == packed.numel()
            found = opener.tunable(stored, open_packed(stored)[1]).parameters
            assert found.keys() == others.keys() and all(torch.equal(found[name], others[name]) for name in others)
            assert torch.equal(unpack(stored), opened.rebuild(others))


@pytest.mark.parametrize("codec", TUNABLE)
def test_gradients_are_those_of_the_weight(codec):
    """The weight is linear in each of its numbers alone, so that a difference is the derivative.

    Rotations are float32, so that its sum is rounded by as much of what is added up.
    """
    for packed in pool(codec, [(12, 50)], [torch.float32]):
        opener, header = open_packed(packed)
        opened = opener.tunable(packed, header)
        values = {name: each.double() for name, each in opened.parameters.items()}
        leaves = {name: each.clone().requires_grad_() for name, each in values.items()}
        slope = torch.randn(header.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        (opened.rebuild(leaves) * slope).sum().backward()
        for name in values:
            for index in range(0, values[name].numel(), 5):
                step = torch.zeros_like(values[name])
                step.view(-1)[index] = 0.5
                ahead, behind = (opened.rebuild(values | {name: values[name] + by}) for by in (step, -step))
                added = (ahead - behind) * slope
                rounded = 2**-23 * float(added.abs().sum()) if codec == "trellis" else 1e-9
                expected = pytest.approx(float(added.sum()), rel=1e-6, abs=rounded)
                assert float(leaves[name].grad.view(-1)[index]) == expected
