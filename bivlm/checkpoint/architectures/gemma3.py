"""Gemma 3: a SigLIP tower, a projector that is a bare parameter (left alone), a decoder whose head is the embedding."""

from bivlm.checkpoint.architectures import Family

FAMILY = Family(
    model_types=("gemma3",),
    vision=("model.vision_tower",),
    adaptor=("model.multi_modal_projector",),
    language=("model.language_model", "lm_head"),
)
