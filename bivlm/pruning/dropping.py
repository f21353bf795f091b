"""Drop tokens from every prompt that a model reads within a block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import ValidationError
from transformers import PreTrainedModel

from bivlm.checkpoint.architectures import ARCHITECTURES, Modules
from bivlm.checkpoint.reading import Checkpoint
from bivlm.errors import InputError
from bivlm.pruning.anatomy import anatomy
from bivlm.pruning.language import LanguagePruning
from bivlm.pruning.reading import Tally
from bivlm.pruning.vision import VisionPruning
from bivlm.recipe.pruning import PRUNING_KEY, PruningSettings


@dataclass(frozen=True)
class Kept:
    """The kept tokens of the prompt that was read last, bool: true for a token that was kept.

    Attributes:
        vision: of the tokens in the vision encoder (images or tiles, tokens); None if it drops none.
        language: of the tokens of the prompts (B, T), false for padding.
        states: of the image features (B, S) of a model with cross-attention.
    """

    vision: torch.Tensor | None
    language: torch.Tensor | None
    states: torch.Tensor | None


class Pruning:
    """The view that `pruned` yields of what it does."""

    def __init__(self, language: LanguagePruning, vision: VisionPruning | None, tally: Tally) -> None:
        self._language, self._vision, self._tally = language, vision, tally

    def kept_shares(self) -> dict[str, float]:
        """Return the share of tokens that was kept, over all prompts so far: of "image" tokens, and of "text" tokens.

        Tokens that may never be dropped do not count; a kind without tokens is left out.
        """
        return self._tally.kept_shares()

    def kept(self) -> Kept:
        """Return the tokens that were kept of the prompt that was read last."""
        vision = self._vision.tokens if self._vision is not None else None
        tokens, states = self._language.tokens, self._language.states
        return Kept(*(None if each is None else each.alive_BT for each in (vision, tokens, states)))


@contextmanager
def pruned(model: PreTrainedModel, settings: PruningSettings, modules: Modules | None = None) -> Iterator[Pruning]:
    """Drop tokens from every prompt that `model` reads within the block, in ``forward`` and in ``generate``.

    Logits of dropped tokens mean nothing. Prompts are given as ``input_ids``, with an ``attention_mask`` of (B, T) if
    they are padded; a cache belongs to the block that it was made in. `modules` say what is vision and language in an
    architecture that bivlm does not know. Raises `InputError` for an unknown architecture, a layer out of range, and on
    reading a prompt for a share that leaves no token.
    """
    parts = anatomy(model, modules)
    if settings.place in ("vision", "joint") and model.config.model_type not in ARCHITECTURES:
        raise InputError(
            f"pruning.place: found {settings.place!r}, expected 'input', 'language' or 'text': in which order the "
            f"vision encoder of {model.config.model_type} keeps its tokens is not known"
        )
    tally = Tally()
    vision = VisionPruning(parts, settings, tally) if settings.place in ("vision", "joint") else None
    language = LanguagePruning(parts, model, settings, tally, vision)
    with ExitStack() as stack:
        language.enter(stack)
        if vision is not None:
            vision.enter(stack)
        yield Pruning(language, vision, tally)


def pruned_if(
    model: PreTrainedModel, settings: PruningSettings | None, modules: Modules | None = None
) -> AbstractContextManager[Pruning | None]:
    """Return `pruned`, or a context that does nothing without `settings`."""
    return nullcontext() if settings is None else pruned(model, settings, modules)


def carried_pruning(folder: str | Path) -> PruningSettings | None:
    """Return the setting that a packed checkpoint carries, if any; raise `InputError` for one that is not valid."""
    quantization = Checkpoint.open(folder).quantization or {}
    if (carried := quantization.get(PRUNING_KEY)) is None:
        return None
    try:
        return PruningSettings.model_validate(carried)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, ("quantization_config", PRUNING_KEY, *first["loc"])))
        raise InputError(f"checkpoint {folder}: {place}: {first['msg']}") from None
