"""``dequantize: packed`` multiplies a few tokens straight from the bytes, as exactly as float32 can."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from tiny_families import llava, make_tiny
from torch import nn
from transformers import AutoModelForImageTextToText

from bivlm import compress_model
from bivlm.checkpoint.packed_modules import MOST_TOKENS, PackedLinear
from bivlm.checkpoint.transformers_plugin import BiVLMConfig
from bivlm.compression.model import pack_layer
from bivlm.errors import InputError
from bivlm.packing import product, side_table, unpack

TRELLIS = {"method": "trellis", "rate": 2.0, "feedback": "none"}


def packed_weight(shape=(96, 200), dtype=torch.bfloat16, **settings):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return pack_layer(weight.to(dtype), TRELLIS | settings)[0]


needs_kernel = pytest.mark.skipif(
    side_table(packed_weight()) is None, reason="the native code was not built, or this processor has no AVX2"
)
pytestmark = [needs_kernel, pytest.mark.filterwarnings("ignore:You passed `quantization_config`")]


def layer(dtype=torch.bfloat16, bias=True):
    """A layer of 96 outputs and 200 inputs that multiplies straight from its bytes."""
    packed = packed_weight(dtype=dtype)
    linear = nn.Linear(200, 96, bias=bias, dtype=dtype)
    found = PackedLinear.replacing(linear, packed.numel(), "tower.fc1")
    found.weight.data.copy_(packed)
    found.bias = linear.bias
    found.go_straight()
    return found


@pytest.mark.parametrize("rotate", ["none", "inputs", "outputs", "both"])
@pytest.mark.parametrize("rate", [0.75, 1.5, 2.0, 2.75])
@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
def test_a_product_is_that_of_the_unrounded_weight(rotate, rate, scale):
    weight = torch.randn(130, 300, generator=torch.Generator().manual_seed(1)) * scale
    packed = pack_layer(weight, TRELLIS | {"rate": rate, "rotate": rotate, "seed": 3})[0]
    x = torch.randn(4, 300)
    before = x.clone()
    expected = x.double() @ unpack(packed).double().T
    torch.testing.assert_close(product(packed, side_table(packed), x).double(), expected, rtol=1e-4, atol=3e-5 * scale)
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("bias", [True, False])
def test_a_few_tokens_are_rounded_once(dtype, bias):
    chosen, x = layer(dtype, bias), torch.randn(3, 5, 200).to(dtype)
    with torch.no_grad():
        y = chosen(x)
    unrounded = product(chosen.weight.data, chosen.side_table, x.reshape(-1, 200).float())
    unrounded = unrounded + chosen.bias.float() if bias else unrounded
    assert y.dtype == dtype and torch.equal(y, unrounded.to(dtype).view(3, 5, 96))


@pytest.mark.parametrize("case", ["many tokens", "gradient", "autocast", "no token"])
def test_the_rest_rebuilds_the_weight(case, monkeypatch):
    monkeypatch.setattr("bivlm.checkpoint.packed_modules.product", None)
    chosen, dtype = layer(), torch.bfloat16
    x = torch.randn(0 if case == "no token" else MOST_TOKENS + 1 if case == "many tokens" else 2, 200, dtype=dtype)
    dense = chosen.dequantized()
    if case == "gradient":
        x.requires_grad_(True)
        chosen(x).sum().backward()
        assert x.grad.abs().sum() > 0
        return
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"):
        assert torch.equal(chosen(x), dense(x))


@pytest.mark.parametrize(
    "settings",
    [
        TRELLIS,
        {"method": "rtn", "bits": 3, "group_size": 32},
        {"method": "bivlm", "groups": 2, "p_max": 0.05},
        {"method": "bivlm", "groups": 5, "p_max": 0.3, "salient_bits": 1},
    ],
)
def test_a_layer_is_copied_and_cast_and_saved_without_what_lies_beside_its_bytes(settings):
    weight = torch.randn(96, 200, generator=torch.Generator().manual_seed(2))
    packed = pack_layer(weight, settings)[0]
    chosen = PackedLinear.replacing(nn.Linear(200, 96, bias=False), packed.numel(), "tower.fc1")
    chosen.weight.data.copy_(packed)
    chosen.go_straight()
    x = torch.randn(3, 200)
    with torch.no_grad():
        expected = chosen(x)
        torch.testing.assert_close(expected, chosen.dequantized()(x), rtol=1e-5, atol=1e-4)
        assert torch.equal(copy.deepcopy(chosen)(x), expected)
        assert sorted(chosen.state_dict()) == ["weight"]
        cast = copy.deepcopy(chosen).to(torch.float16)
        assert torch.equal(cast(x.half()), product(packed, side_table(packed), x.half().float()).half())


def test_other_bytes_that_are_loaded_get_what_lies_beside_them():
    settings, generator = {"method": "rtn", "bits": 3, "group_size": 32}, torch.Generator().manual_seed(4)
    one, other = (pack_layer(torch.randn(96, 200, generator=generator), settings)[0] for _ in range(2))
    chosen = PackedLinear.replacing(nn.Linear(200, 96, bias=False), one.numel(), "tower.fc1")
    chosen.weight.data.copy_(one)
    chosen.go_straight()
    chosen.load_state_dict({"weight": other})
    x = torch.randn(3, 200)
    with torch.no_grad():
        torch.testing.assert_close(chosen(x), x @ unpack(other).T, rtol=1e-5, atol=1e-4)


def test_it_is_an_operator_that_torch_can_compile():
    chosen, x = layer(torch.float32), torch.randn(2, 200)
    given = (x, chosen.weight.data, chosen.side_table, 96, "weight", "float32")
    torch.library.opcheck(torch.ops.bivlm.product.default, given)
    with torch.no_grad():
        assert torch.equal(torch.compile(chosen, fullgraph=True, backend="eager")(x), chosen(x))


@pytest.mark.parametrize(
    "settings, exact",
    [
        ({"method": "rtn", "bits": 2, "group_size": 32}, False),
        ({"method": "bivlm", "groups": 2, "p_max": 0.05}, False),
        (TRELLIS, True),
    ],
)
def test_int8_activations_are_those_of_layers_that_have_such_products(settings, exact):
    packed = pack_layer(torch.randn(96, 200, generator=torch.Generator().manual_seed(2)), settings)[0]
    chosen = PackedLinear.replacing(nn.Linear(200, 96, bias=False), packed.numel(), "tower.fc1")
    chosen.weight.data.copy_(packed)
    x = torch.randn(3, 200)
    with torch.no_grad():
        chosen.go_straight()
        expected = chosen(x)
        chosen.go_straight("int8")
        rounded = chosen(x)
        assert torch.equal(copy.deepcopy(chosen)(x), rounded)
    assert torch.equal(rounded, expected) == exact
    assert float((rounded - expected).norm() / expected.norm()) < 0.02


@pytest.mark.parametrize("wrong", [{"activations": "int4"}, {"activations": "int8", "dequantize": "forward"}])
def test_activations_that_cannot_be_had_are_refused(wrong):
    with pytest.raises(InputError, match=r"activations 'int.'.*expected"):
        BiVLMConfig(**wrong)


def test_a_config_says_int8_activations_where_they_are():
    given = BiVLMConfig(dequantize="packed", activations="int8")
    assert BiVLMConfig(**given.to_dict()).activations == "int8"
    assert "activations" not in BiVLMConfig().to_dict()


def test_a_model_answers_as_the_ordinary_one_and_is_saved_with_the_same_bytes(tmp_path):
    inputs = make_tiny(llava, tmp_path / "base")
    recipe = tmp_path / "trellis.yaml"
    recipe.write_text("name: trellis\nformat: 1\ncomponents: {language: {method: trellis, feedback: none}}\n")
    compress_model(tmp_path / "base", recipe, tmp_path / "packed")
    models = {
        way: AutoModelForImageTextToText.from_pretrained(
            tmp_path / "packed", quantization_config=BiVLMConfig(dequantize=way), dtype=torch.float32
        )
        for way in ("load", "packed")
    }
    layers = [module for module in models["packed"].modules() if isinstance(module, PackedLinear)]
    assert layers and all(module.side_table is not None for module in layers)
    step = {"input_ids": inputs["input_ids"][:, :4]}  # no image: a few tokens
    with torch.no_grad():
        dense, straight = (
            models[way].generate(**step, max_new_tokens=6, do_sample=False) for way in ("load", "packed")
        )
        logits = [models[way](**step).logits for way in ("load", "packed")]
    torch.testing.assert_close(*logits, rtol=0.02, atol=0.02)
    assert dense.shape == straight.shape
    models["packed"].save_pretrained(tmp_path / "again")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("packed", "again"))
    packed = [name for name, tensor in before.items() if tensor.dtype == torch.uint8]
    assert packed and all(torch.equal(before[name], after[name]) for name in packed)
