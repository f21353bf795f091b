"""The shape of the reference model: a SigLIP tower, a two-layer projector and a Qwen2 decoder."""

from dataclasses import dataclass

from transformers import GenerationConfig, LlavaConfig, LlavaForConditionalGeneration, Qwen2Config, SiglipVisionConfig

from bivlm.reference.tokenizer import IMAGE_TOKEN

IMAGE_SIZE = 128
PATCH_SIZE = 16


@dataclass(frozen=True)
class Size:
    """Widths and depths. `hidden` serves both towers, so that the projector is square."""

    hidden: int = 256
    heads: int = 4
    kv_heads: int = 2
    vision_layers: int = 3
    vision_intermediate: int = 512
    decoder_layers: int = 8
    decoder_intermediate: int = 512


REFERENCE = Size()
TINY = Size(
    hidden=64, heads=2, kv_heads=1, vision_layers=1, vision_intermediate=64, decoder_layers=2, decoder_intermediate=64
)


def build_config(tokenizer, size: Size = REFERENCE) -> LlavaConfig:
    """The model's config for a tokenizer; special token ids are read from the tokenizer."""
    vision = SiglipVisionConfig(
        hidden_size=size.hidden,
        intermediate_size=size.vision_intermediate,
        num_hidden_layers=size.vision_layers,
        num_attention_heads=size.heads,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        vision_use_head=False,
    )
    text = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=size.hidden,
        intermediate_size=size.decoder_intermediate,
        num_hidden_layers=size.decoder_layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        initializer_range=size.hidden**-0.5,  # the usual 0.02 is for widths of thousands; here it makes 1e-3 unstable
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_seq_length=(IMAGE_SIZE // PATCH_SIZE) ** 2,
        tie_word_embeddings=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def build_model(tokenizer, size: Size = REFERENCE) -> LlavaForConditionalGeneration:
    """A freshly initialised model in float32; the caller seeds torch."""
    model = LlavaForConditionalGeneration(build_config(tokenizer, size))
    model.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=16, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    return model
