"""What a GGUF file says about a model besides its tensors: architecture, sizes, rotation, images.

llama.cpp reads keys, not a config, and takes what a key does not say for granted. A config that means something else is
refused here, before a file is written. Sources: llama.cpp's ``conversion/base.py``, ``conversion/qwenvl.py``,
``tools/mtmd/clip.cpp``.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from bivlm.checkpoint.reading import Checkpoint
from bivlm.errors import InputError
from bivlm.exports.gguf_names import blocks_used
from bivlm.untrusted import MODEL_CONFIG, read_object, short

if TYPE_CHECKING:
    from gguf import GGUFWriter

MODEL_TYPES = ("llava", "qwen2_5_vl")
# llama.cpp's architecture by that of the language model.
TEXT_ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen2_5_vl_text": "qwen2vl"}
_TOWERS = ("clip_vision_model", "siglip_vision_model")
# llama.cpp computes every GELU but CLIP's by its tanh formula.
_GELUS = ("gelu", "gelu_pytorch_tanh", "gelu_new")
_QWEN_WINDOW = 112  # pixels
_QWEN_EPSILON = 1e-6  # of the norms in transformers' modeling_qwen2_5_vl.py, where no config says it
_QWEN_IMAGE_SIZE = 560  # a width of any number of patches will do
_PROCESSORS = ("processor_config.json", "preprocessor_config.json")


def check_config(config: Any, source: Path) -> None:
    """Raise `InputError` naming `source` and the key for a model that llama.cpp would not run as transformers does."""
    _expect(source, "model_type", config.model_type, MODEL_TYPES)
    text = config.text_config
    _expect(source, "text_config.model_type", text.model_type, tuple(TEXT_ARCHITECTURES))
    _expect(source, "text_config.hidden_act", text.hidden_act, ("silu",))
    _expect(source, "text_config.rope_parameters.rope_type", text.rope_parameters["rope_type"], ("default",))
    _expect(source, "text_config.use_sliding_window", getattr(text, "use_sliding_window", False), (False, None))
    vision = config.vision_config
    if config.model_type == "qwen2_5_vl":
        _check_qwen(vision, source)
    else:
        _check_llava(config, source)
    if vision.intermediate_size == vision.hidden_size:
        raise InputError(
            f"{source}: vision_config.intermediate_size: found {vision.intermediate_size}, as hidden_size; llama.cpp "
            "would take the two feed-forward layers for each other"
        )


def _check_qwen(vision: Any, source: Path) -> None:
    _expect(source, "vision_config.hidden_act", vision.hidden_act, ("silu",))
    _expect(source, "vision_config.temporal_patch_size", vision.temporal_patch_size, (2,))
    _expect(source, "vision_config.spatial_merge_size", vision.spatial_merge_size, (2,))
    _expect(source, "vision_config.window_size", vision.window_size, (_QWEN_WINDOW,))
    full = list(vision.fullatt_block_indexes)
    every = full[0] + 1 if full else 0
    if not every or full != list(range(every - 1, vision.depth, every)):
        raise InputError(f"{source}: vision_config.fullatt_block_indexes: found {short(full)}, expected every n-th")


def _check_llava(config: Any, source: Path) -> None:
    vision = config.vision_config
    _expect(source, "vision_config.model_type", vision.model_type, _TOWERS)
    _expect(source, "vision_config.hidden_act", vision.hidden_act, (*_GELUS, "quick_gelu"))
    _expect(source, "projector_hidden_act", config.projector_hidden_act, _GELUS)
    _expect(source, "multimodal_projector_bias", config.multimodal_projector_bias, (True,))
    layer, count = config.vision_feature_layer, vision.num_hidden_layers
    if type(layer) is not int or not 0 < blocks_used(config) <= count:
        raise InputError(f"{source}: vision_feature_layer: found {short(layer)}, expected one layer of {count}")
    # llama.cpp leaves the class token out where there is one, and has no other choice.
    strategy = "default" if vision.model_type == "clip_vision_model" else "full"
    _expect(source, "vision_feature_select_strategy", config.vision_feature_select_strategy, (strategy,))


def _expect(source: Path, key: str, found: Any, valid: tuple[Any, ...]) -> None:
    if found not in valid:
        expected = ", ".join(str(each) for each in valid)
        raise InputError(f"{source}: {key}: found {short(found)}; GGUF holds {expected}")


def describe_text(writer: GGUFWriter, config: Any) -> None:
    """Write the sizes of the language model, and how it rotates queries and keys."""
    text = config.text_config
    writer.add_block_count(text.num_hidden_layers)
    writer.add_context_length(text.max_position_embeddings)
    writer.add_embedding_length(text.hidden_size)
    writer.add_feed_forward_length(text.intermediate_size)
    writer.add_head_count(text.num_attention_heads)
    writer.add_head_count_kv(text.num_key_value_heads)
    writer.add_layer_norm_rms_eps(text.rms_norm_eps)
    writer.add_vocab_size(text.vocab_size)
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(text.rope_parameters["rope_theta"])
    if sections := text.rope_parameters.get("mrope_section"):
        writer.add_rope_dimension_sections([*sections, *[0] * (4 - len(sections))])


def describe_vision(writer: GGUFWriter, config: Any, checkpoint: Checkpoint) -> None:
    """Write the sizes of tower and projector, and how pixels are normalized.

    Raises `InputError` naming the processor's config if it does not say how.
    """
    vision = config.vision_config
    qwen = config.model_type == "qwen2_5_vl"
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type("qwen2.5vl_merger" if qwen else "mlp")
    writer.add_vision_projection_dim(config.text_config.hidden_size)
    writer.add_vision_image_size(_QWEN_IMAGE_SIZE if qwen else vision.image_size)
    writer.add_vision_patch_size(vision.patch_size)
    writer.add_vision_embedding_length(vision.hidden_size)
    writer.add_vision_feed_forward_length(vision.intermediate_size)
    writer.add_vision_head_count(vision.num_heads if qwen else vision.num_attention_heads)
    writer.add_vision_attention_layernorm_eps(_QWEN_EPSILON if qwen else vision.layer_norm_eps)
    mean, std = _normalization(checkpoint)
    writer.add_vision_image_mean(mean)
    writer.add_vision_image_std(std)
    if qwen:
        writer.add_vision_block_count(vision.depth)
        writer.add_vision_use_silu(True)
        writer.add_vision_n_wa_pattern(vision.fullatt_block_indexes[0] + 1)
    else:
        writer.add_vision_block_count(blocks_used(config))
        writer.add_array("clip.vision.feature_layer", [blocks_used(config)])
        writer.add_vision_use_gelu(vision.hidden_act in _GELUS)


def _normalization(checkpoint: Checkpoint) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation of each colour."""
    for name in _PROCESSORS:
        file = checkpoint.folder / name
        if not file.exists():
            continue
        said = read_object(file, MODEL_CONFIG)
        said = said.get("image_processor", said)
        if not isinstance(said, dict) or not {"image_mean", "image_std"} <= said.keys():
            continue
        pair = (said["image_mean"], said["image_std"])
        for key, numbers in zip(("image_mean", "image_std"), pair, strict=True):
            if (
                not isinstance(numbers, list)
                or len(numbers) != 3
                or not all(type(each) in (int, float) for each in numbers)
            ):
                raise InputError(f"{file}: {key}: expected three numbers, found {short(numbers)}")
        return pair
    raise InputError(f"checkpoint {checkpoint.folder}: image_mean: none of {', '.join(_PROCESSORS)} says it")
