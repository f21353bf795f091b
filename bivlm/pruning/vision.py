"""Drop image tokens in the vision encoder, from some layer on.

Layers compute on the tokens that are left. Around them every tensor keeps its full size, with NaN at dropped places:
whatever merges, packs and projects the features afterwards carries the mark to the image tokens that saw a dropped one,
and the language model drops these (`bivlm.pruning.language`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from bivlm.errors import InputError
from bivlm.pruning.anatomy import Anatomy
from bivlm.pruning.attention import observing, received
from bivlm.pruning.reading import Sequence, Tally, seed_of
from bivlm.recipe.pruning import PruningSettings

Forward = Callable[..., torch.Tensor]


class VisionPruning:
    """Wrappers around the vision encoder's layers.

    Attributes:
        tokens: the images that were read last, each a row: (images or tiles, tokens), or (images, all tokens) where the
            encoder sees one sequence, in which an image is a run of tokens.
    """

    def __init__(self, parts: Anatomy, settings: PruningSettings, tally: Tally) -> None:
        """Raise `InputError` for a layer out of range and for a model that shuffles pixels."""
        if parts.shuffled:
            raise InputError(
                f"pruning.place: found {settings.place!r}, expected 'input', 'language' or 'text': this model shuffles "
                "neighbouring pixels of its vision encoder's output into one image token, and dropping some of them is "
                "not supported"
            )
        self._parts, self._settings, self._tally = parts, settings, tally
        self.tokens: Sequence | None = None
        self._pixels: torch.Tensor | None = None
        self._sizes: list[int] = []
        self._seen: list[torch.Tensor] = []
        self._broken: torch.Tensor | None = None
        last = len(parts.vision_layers) - 1
        if settings.layer is None or not 1 <= settings.layer <= last:
            raise InputError(
                f"pruning.layer: found {settings.layer}, expected 1 to {last}, the vision encoder's last layer"
            )
        self._layer = settings.layer

    @property
    def dropped(self) -> bool:
        """Whether any token of the images that were read last was."""
        return self.tokens is not None and self.tokens.shortened is not None

    @property
    def gave_nan(self) -> bool:
        """Whether a layer gave NaN or infinity for a token that was there; waits for the device."""
        return self._broken is not None and bool(self._broken)

    def forget(self) -> None:
        """Forget the images of the last prompt before another is read."""
        self.tokens, self._seen = None, []

    def enter(self, stack: ExitStack) -> None:
        """Put the wrappers around; they go with `stack`."""
        stack.callback(self._parts.tower.register_forward_pre_hook(self._begin, with_kwargs=True).remove)
        for number, layer in enumerate(self._parts.vision_layers):
            layer.forward = self._wrapped(number, layer.forward)
            stack.callback(layer.__dict__.pop, "forward", None)
        if self._settings.score == "attention":
            stack.enter_context(observing(self._parts.vision_layers[self._layer - 1], self._see))

    def _begin(self, _module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        self._pixels = arguments[0] if arguments else named.get("pixel_values", named.get("hidden_states"))
        grid = named.get("grid_thw", arguments[1] if len(arguments) > 1 else None)
        self._sizes = [] if grid is None else grid.prod(-1).tolist()
        self._broken = None
        self.forget()

    def _look(self, hidden_states: torch.Tensor, mask: torch.Tensor | None) -> Sequence:
        """Return the images' tokens as they enter the encoder."""
        if hidden_states.dim() == 2:  # one sequence of all images
            rows = torch.arange(len(self._sizes), device=hidden_states.device)
            owner_T = rows.repeat_interleave(torch.tensor(self._sizes, device=hidden_states.device))
            alive_IT = owner_T == rows[:, None]
            return Sequence(
                alive_IT, alive_IT, self._seeds(lambda pixels: pixels.split(self._sizes)), self._parts.merged
            )
        alive_BT = torch.ones(hidden_states.shape[:2], dtype=torch.bool, device=hidden_states.device)
        candidates_BT = alive_BT.clone()
        if self._parts.class_token:
            candidates_BT[:, 0] = False
        if mask is not None:  # padding may look at anything but padding, and others look at it
            candidates_BT &= mask.diagonal(dim1=2, dim2=3)[:, 0] == 0
        return Sequence(candidates_BT, alive_BT, self._seeds(lambda pixels: pixels.reshape(len(hidden_states), -1)))

    def _seeds(self, images: Callable[[torch.Tensor], Iterable[torch.Tensor]]) -> list[int]:
        """Return a seed per image or tile; none unless needed, since the pixels have to be brought to the CPU."""
        if self._settings.score != "random" or self._pixels is None:
            return []
        return [seed_of(each) for each in images(self._pixels)]

    def _see(
        self, query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, scale: float, _causal: bool
    ) -> None:
        """Collect scores of a batch of images, or of the next window of a sequence of images."""
        counts_BQ = torch.ones(query.shape[0], query.shape[2], dtype=torch.bool, device=query.device)
        # A window's scores add up to its length: a token of a large window counts as much as one of a small.
        self._seen.append(query.shape[2] * received(query, key, mask, scale, False, counts_BQ))

    def _wrapped(self, number: int, forward: Forward) -> Forward:
        def run(hidden_states: torch.Tensor, *arguments: Any, **named: Any) -> torch.Tensor:
            mask = arguments[0] if arguments else named.get("attention_mask")
            if self.tokens is None:
                self.tokens = self._look(hidden_states, mask)
            tokens = self.tokens
            if number == self._layer:
                scores_BT = torch.cat(self._seen, dim=1).expand(len(tokens.alive_BT), -1) if self._seen else None
                self._tally.add("image", tokens.choose(self._settings, scores_BT))
            left = tokens.shortened
            if left is None:
                whole = forward(hidden_states, *arguments, **named)
                self._watch(whole)
                return whole
            nothing = torch.full_like(hidden_states, torch.nan)
            if hidden_states.dim() == 2:
                alive_T = tokens.alive_BT.any(0)
                named["position_embeddings"] = tuple(each[alive_T] for each in named["position_embeddings"])
                named["cu_seqlens"] = _ends(named["cu_seqlens"], alive_T)
                nothing[alive_T] = forward(hidden_states[alive_T], *arguments, **named)
                self._watch(nothing[alive_T])
                return nothing
            mask = left.mask(mask, causal=False)
            if arguments:
                arguments = (mask, *arguments[1:])
            else:
                named["attention_mask"] = mask
            short = forward(left.take(hidden_states), *arguments, **named)
            self._watch(short[left.filled_BK])
            return left.put_back(short, nothing)

        return run

    def _watch(self, left: torch.Tensor) -> None:
        """Remember whether what a layer gave is finite: NaN of its own would look like a dropped token."""
        broken = ~left.isfinite().all()
        self._broken = broken if self._broken is None else self._broken | broken


def _ends(ends: torch.Tensor, alive_T: torch.Tensor) -> torch.Tensor:
    """Return where windows end in the sequence that is left, 0 first; windows that lost all tokens are left out."""
    before = torch.nn.functional.pad(alive_T.cumsum(0), (1, 0))
    return before[ends.long()].unique_consecutive().to(ends.dtype)
