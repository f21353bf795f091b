"""The shipped checkpoint is an ordinary one, of the promised shape, and really answers."""

import pytest
import torch
from safetensors import safe_open

from bivlm.evaluation.benchmark import load_benchmark
from bivlm.evaluation.generation import load_model
from bivlm.evaluation.outcomes import evaluate
from bivlm.evaluation.reference_sets import chance
from bivlm.reference import CHECKPOINT
from bivlm.reference.question_sets import QUESTION_SETS

pytestmark = pytest.mark.skipif(not CHECKPOINT.exists(), reason="no checkpoint in this tree")


@pytest.fixture(scope="module")
def loaded():
    return load_model(CHECKPOINT, "cpu")


def test_the_auto_classes_load_a_llava_model_with_a_siglip_tower_and_a_qwen_decoder(loaded):
    config = loaded[0].config
    assert type(loaded[0]).__name__ == "LlavaForConditionalGeneration"
    assert (config.vision_config.model_type, config.text_config.model_type) == ("siglip_vision_model", "qwen2")
    assert config.vision_config.vision_use_head is False
    assert config.vision_feature_layer == -1


def test_the_shape_is_the_promised_one(loaded):
    model = loaded[0]
    vision, text = model.config.vision_config, model.config.text_config
    assert 5e6 <= sum(p.numel() for p in model.parameters()) <= 12e6
    assert (vision.image_size // vision.patch_size) ** 2 >= 64
    assert text.num_hidden_layers >= 8
    widths = {size for m in model.modules() if isinstance(m, torch.nn.Linear) for size in (m.in_features,)}
    assert all(width >= 256 and width % 64 == 0 for width in widths)


def test_shards_are_bf16_and_at_most_fifteen_megabytes():
    for shard in CHECKPOINT.glob("*.safetensors"):
        assert shard.stat().st_size <= 15_000_000
        with safe_open(shard, "pt") as tensors:
            assert {str(tensors.get_tensor(key).dtype) for key in tensors.keys()} == {"torch.bfloat16"}  # noqa: SIM118


def test_a_conversation_is_rendered_as_in_training(loaded):
    processor = loaded[1]
    turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Is it?"}]}]
    assert processor.apply_chat_template(turns, add_generation_prompt=True) == "USER: <image>\nIs it? ASSISTANT:"


@pytest.mark.parametrize("name", QUESTION_SETS)
def test_answers_are_far_above_chance(loaded, name):
    result = evaluate(*loaded, load_benchmark(f"reference:{name}", 64))
    assert result.metrics["accuracy"] > chance(name) + 25
