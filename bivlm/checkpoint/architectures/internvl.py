"""InternVL in transformers' own format (OpenGVLab/...-hf): an InternViT tower, pixel shuffle, a two-layer projector."""

from bivlm.checkpoint.architectures import Family

FAMILY = Family(
    model_types=("internvl",),
    vision=("model.vision_tower",),
    adaptor=("model.multi_modal_projector",),
    language=("model.language_model", "lm_head"),
)
