"""PaliGemma 1 and 2: a SigLIP tower, one linear layer, a Gemma decoder whose head is the embedding."""

from bivlm.checkpoint.architectures import Family

FAMILY = Family(
    model_types=("paligemma",),
    vision=("model.vision_tower",),
    adaptor=("model.multi_modal_projector",),
    language=("model.language_model", "lm_head"),
)
