"""Whole models with packed weights multiplied straight from their bytes: images, padding, pruning, caches."""

from contextlib import nullcontext

import pytest
import torch
from tiny_families import idefics3, llava, llava_onevision, make_tiny, mllama, qwen2_5_vl
from transformers import AutoModelForImageTextToText

from bivlm import compress_model
from bivlm.checkpoint.packed_modules import PackedLinear
from bivlm.checkpoint.transformers_plugin import BiVLMConfig
from bivlm.packing import plane_product
from bivlm.pruning.dropping import pruned
from bivlm.recipe.pruning import PruningSettings

FAMILIES = (llava, qwen2_5_vl, mllama, llava_onevision, idefics3)
RECIPE = """name: both
format: 1
components:
  vision: {method: rtn, bits: 4, group_size: 16}
  adaptor: {method: rtn, bits: 8, group_size: 16}
  language: {method: bivlm, groups: 2, p_max: 0.05}
"""
pytestmark = [
    pytest.mark.skipif(plane_product.lanes() == 0, reason="the native code was not built, or no AVX2"),
    pytest.mark.filterwarnings("ignore:You passed `quantization_config`"),
]


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda build: build.__name__)
def case(request, tmp_path_factory):
    """Inputs, and the same packed model rebuilt, multiplied from its bytes, and with int8 activations."""
    folder = tmp_path_factory.mktemp("packed")
    inputs = make_tiny(request.param, folder / "base", torch.float32)
    (folder / "both.yaml").write_text(RECIPE)
    compress_model(folder / "base", folder / "both.yaml", folder / "packed")
    ways = {"load": {}, "packed": {}, "int8": {"dequantize": "packed", "activations": "int8"}}
    return inputs, {
        name: AutoModelForImageTextToText.from_pretrained(
            folder / "packed", quantization_config=BiVLMConfig(**({"dequantize": name} | way)), dtype=torch.float32
        ).eval()
        for name, way in ways.items()
    }


def compare(found, expected, *, exact=True):
    """Of products: to float32's rounding, or to a few hundredths of what is expected, of int8 activations."""
    if exact:
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    else:
        assert float((found - expected).norm() / expected.norm()) < 0.05


@torch.inference_mode()
def test_an_image_and_a_question(case):
    inputs, models = case
    straight = [module for module in models["packed"].modules() if isinstance(module, PackedLinear)]
    assert straight and all(module.side_table is not None for module in straight)
    expected = models["load"](**inputs).logits
    compare(models["packed"](**inputs).logits, expected)
    compare(models["int8"](**inputs).logits, expected, exact=False)


@torch.inference_mode()
def test_text_that_is_padded_on_the_left(case):
    _, models = case
    ids = torch.tensor([[9, 9, 9, 11, 12, 13], [14, 15, 16, 17, 18, 19]])
    mask = torch.tensor([[0, 0, 0, 1, 1, 1], [1] * 6])
    expected = models["load"](input_ids=ids, attention_mask=mask).logits
    compare(models["packed"](input_ids=ids, attention_mask=mask).logits[mask > 0], expected[mask > 0])


@torch.inference_mode()
def test_generation_with_a_cache_and_pruned_tokens(case):
    inputs, models = case
    greedy = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    settings = PruningSettings(place="language", layer=1, share=0.5)
    found = {}
    for name in ("load", "packed"):
        # This Mllama's one cross-attention layer has none before it that could score.
        with pruned(models[name], settings) if "cross_attention_mask" not in inputs else nullcontext():
            found[name] = torch.stack(models[name].generate(**inputs, **greedy).logits)
    compare(found["packed"][0], found["load"][0])
