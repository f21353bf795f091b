"""Find what pruning needs of a loaded model: its layers, which of them look at images, and the image token."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from bivlm.checkpoint.architectures import Architecture, Modules
from bivlm.checkpoint.members import members_of
from bivlm.errors import InputError

_TOKEN_NAMES = ("image_token_id", "image_token_index")
_CLASS_TOKENS = ("embeddings.class_embedding", "embeddings.cls_token")
_SHUFFLES = ("scale_factor", "downsample_ratio")  # settings of a pixel shuffle
_EXACT = ("full_attention", "cross_attention")


@dataclass(frozen=True)
class Anatomy:
    """The parts of a vision-language model.

    Attributes:
        tower: the vision encoder.
        vision_layers: its layers in the order in which they run.
        text_model: the module whose direct list of layers is the language model's.
        language_layers: those.
        cross_layers: which of them attend to image features instead of holding image tokens among the text.
        image_token: id of the image token.
        merged: vision tokens that become one image token.
        class_token: whether each row of vision tokens begins with one that stands for no patch.
        shuffled: whether vision tokens that are neighbours in the image, but not in the sequence, become one image
            token.
    """

    tower: nn.Module
    vision_layers: list[nn.Module]
    text_model: nn.Module
    language_layers: list[nn.Module]
    cross_layers: list[int]
    image_token: int
    merged: int
    class_token: bool
    shuffled: bool


def anatomy(model: PreTrainedModel, modules: Modules | None = None) -> Anatomy:
    """Look at a model.

    Raises `InputError` for an architecture that is not known or has no image token, and for language layers that see a
    window or keep a state: of a sequence that lacks tokens they would see others.
    """
    members = members_of(model, modules)
    token = next((value for name in _TOKEN_NAMES if (value := getattr(model.config, name, None)) is not None), None)
    if token is None:
        raise InputError(f"{model.config.model_type}: no image token; pruning expects one of {', '.join(_TOKEN_NAMES)}")
    _check_layer_types(model)
    vision = dict(_layers(model, members, "vision"))
    language = dict(_layers(model, members, "language"))
    if not vision or not language:
        raise InputError(f"{model.config.model_type}: expected a vision encoder and a language model with layers")
    tower = model.get_submodule(next(name for name in members.vision if next(iter(vision)).startswith(name)))
    return Anatomy(
        tower=tower,
        vision_layers=list(vision.values()),
        text_model=model.get_submodule(next(iter(language)).rpartition(".")[0].rpartition(".")[0]),
        language_layers=list(language.values()),
        cross_layers=[number for number, layer in enumerate(language.values()) if hasattr(layer, "cross_attn")],
        image_token=token,
        merged=getattr(tower, "spatial_merge_size", 1) ** 2,
        class_token=any(name.endswith(_CLASS_TOKENS) for name, _ in tower.named_parameters()),
        shuffled=any(getattr(model.config, name, None) is not None for name in _SHUFFLES),
    )


def _check_layer_types(model: PreTrainedModel) -> None:
    kinds = getattr(model.config.get_text_config(), "layer_types", None) or ()
    other = next((kind for kind in kinds if kind not in _EXACT), None)
    if other is not None:
        raise InputError(
            f"{model.config.model_type}: its language model has layers of {other}; pruning is exact only for "
            f"{' and '.join(_EXACT)}, and is refused"
        )


def _layers(model: nn.Module, members: Architecture, component: str) -> Iterator[tuple[str, nn.Module]]:
    """Yield the entries of the outermost lists of modules in a component, by name."""

    def visit(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        for child_name, child in module.named_children():
            path = f"{name}.{child_name}" if name else child_name
            if isinstance(module, nn.ModuleList) and members.component(path) == component:
                yield path, child
            else:
                yield from visit(path, child)

    return visit("", model)
