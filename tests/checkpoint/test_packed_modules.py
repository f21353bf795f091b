"""A packed linear layer computes what the ordinary layer with the rebuilt weight computes."""

import pytest
import torch
from raw_codec import pack_raw, top_bytes
from torch import nn

from bivlm.checkpoint.packed_modules import PackedLinear
from bivlm.errors import InputError


@pytest.fixture
def linear():
    torch.manual_seed(0)
    return nn.Linear(24, 16, dtype=torch.bfloat16)


@pytest.fixture
def packed(linear):
    return packed_from(linear)


def packed_from(linear):
    data = pack_raw(linear.weight.detach())
    packed = PackedLinear.replacing(linear, data.numel(), "tower.fc1")
    packed.weight.data.copy_(data)
    packed.bias = linear.bias
    return packed


def twin(linear):
    """The ordinary layer with what the codec keeps of the weight."""
    other = nn.Linear(24, 16, dtype=torch.bfloat16)
    other.weight, other.bias = nn.Parameter(top_bytes(linear.weight.detach())), linear.bias
    return other


def test_forward_is_bit_for_bit_that_of_the_ordinary_layer(linear, packed):
    x = torch.randn(2, 3, 24, dtype=torch.bfloat16)
    assert torch.equal(packed(x), twin(linear)(x))


def test_forward_computes_in_the_dtype_of_its_input(linear, packed):
    x = torch.randn(3, 24)
    expected = nn.functional.linear(x, top_bytes(linear.weight.detach()).float(), linear.bias.float())
    assert torch.equal(packed.to(torch.float32)(x), expected)


def test_casting_the_model_leaves_the_packed_bytes_alone(packed):
    before = packed.weight.clone()
    packed.to(torch.float32).half().double()
    assert packed.weight.dtype == torch.uint8
    assert torch.equal(packed.weight, before)


def test_a_layer_without_bias_has_none():
    linear = nn.Linear(24, 16, bias=False, dtype=torch.bfloat16)
    packed = packed_from(linear)
    assert packed.bias is None and packed.dequantized().bias is None


def test_dequantized_is_an_ordinary_layer_with_the_rebuilt_weight(linear, packed):
    dense = packed.dequantized()
    assert type(dense) is nn.Linear
    assert torch.equal(dense.weight, top_bytes(linear.weight.detach()))
    assert dense.bias is packed.bias


def test_dequantized_takes_a_dtype(linear, packed):
    dense = packed.dequantized(torch.float32)
    assert torch.equal(dense.weight, top_bytes(linear.weight.detach()).float())


def test_the_gradient_of_the_input_passes_through(linear, packed):
    x = torch.randn(3, 24, dtype=torch.bfloat16, requires_grad=True)
    packed(x).sum().backward()
    ours, x.grad = x.grad, None
    twin(linear)(x).sum().backward()
    assert torch.equal(ours, x.grad)


def test_a_flipped_bit_is_found_and_named(packed):
    packed.weight.data[-1] ^= 4
    with pytest.raises(InputError, match=r"tower\.fc1\.weight: checksum"):
        packed.verify()


def test_the_packed_weight_of_another_layer_is_found_and_named(packed):
    other = pack_raw(torch.zeros(24, 16, dtype=torch.bfloat16))
    packed.weight.data.copy_(other)
    with pytest.raises(InputError, match=r"tower\.fc1\.weight: packed weight of shape \(24, 16\).*\(16, 24\)"):
        packed.verify()
