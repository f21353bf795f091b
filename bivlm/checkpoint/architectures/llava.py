"""LLaVA 1.5 and 1.6, LLaVA-OneVision: a CLIP or SigLIP tower, a two-layer projector, a decoder."""

from bivlm.checkpoint.architectures import Family

FAMILY = Family(
    model_types=("llava", "llava_next", "llava_onevision"),
    vision=("model.vision_tower",),
    adaptor=("model.multi_modal_projector",),
    language=("model.language_model", "lm_head"),
)
