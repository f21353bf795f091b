"""Drop tokens in the language model: at the prompt, physically, from some layer on.

Layers are run through wrappers of their ``forward``. While a prompt is read they pass the layer what is left of the
sequence; while an answer is generated they cut the mask's columns to what the layer's cache holds. The cache of a layer
that dropped tokens is as short as that, and reports the length of the prompt, since positions continue from there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicLayer

from bivlm.errors import InputError
from bivlm.numerics.logits import not_finite
from bivlm.pruning import selection
from bivlm.pruning.anatomy import Anatomy
from bivlm.pruning.attention import observing, received
from bivlm.pruning.reading import Sequence, Tally, seed_of
from bivlm.pruning.shortened import Shortened
from bivlm.pruning.vision import VisionPruning
from bivlm.recipe.pruning import PruningSettings

Forward = Callable[..., torch.Tensor]


class LanguagePruning:
    """Wrappers around the language model's layers.

    Attributes:
        tokens: the prompt that was read last; image and text tokens, but the candidates are those of `drop`.
        states: of a model with cross-attention, the image features of that prompt.
    """

    def __init__(
        self,
        parts: Anatomy,
        model: PreTrainedModel,
        settings: PruningSettings,
        tally: Tally,
        vision: VisionPruning | None = None,
    ) -> None:
        """Raise `InputError` for a layer out of range; `vision` drops tokens before, if it is given."""
        self._parts, self._model, self._settings, self._tally = parts, model, settings, tally
        self._vision = vision
        self._of_text = settings.place in ("text", "joint")
        self._scored: int | None = None  # the layer whose attention is the score; None if no layer here drops tokens
        self.tokens: Sequence | None = None
        self.states: Sequence | None = None
        self._reading = False
        self._scores_BT: torch.Tensor | None = None
        self._is_image_BT: torch.Tensor | None = None
        self._remembered: WeakKeyDictionary[Any, dict[int, tuple[Shortened | None, Shortened | None]]] = (
            WeakKeyDictionary()
        )
        if settings.layer is not None and settings.place in ("language", "text", "joint"):
            self._scored = self._layer_before(settings.layer)

    @property
    def _prompt(self) -> Sequence:
        """The prompt that is being read."""
        assert self.tokens is not None, "no prompt was read"
        return self.tokens

    @property
    def _image_BT(self) -> torch.Tensor:
        assert self._is_image_BT is not None, "no prompt was read"
        return self._is_image_BT

    @property
    def _drops_states(self) -> bool:
        return bool(self._parts.cross_layers) and not self._of_text

    @property
    def _dropped_from(self) -> Sequence | None:
        """What a layer drops from; None for a prompt without an image, where images are seen by cross-attention."""
        return self.states if self._drops_states else self.tokens

    def _layer_before(self, layer: int) -> int:
        """Return the layer whose attention scores what is dropped from `layer` on."""
        if self._drops_states:
            cross = self._parts.cross_layers
            if not cross[0] < layer <= cross[-1]:
                raise InputError(
                    f"pruning.layer: found {layer}, expected {cross[0] + 1} to {cross[-1]}: images are seen in the "
                    f"cross-attention layers {', '.join(map(str, cross))}, and one of them has to be before it"
                )
            return max(number for number in cross if number < layer)
        last = len(self._parts.language_layers) - 1
        if not 1 <= layer <= last:
            raise InputError(f"pruning.layer: found {layer}, expected 1 to {last}, the language model's last layer")
        before = [number for number in range(layer) if number not in self._parts.cross_layers]
        return before[-1]

    def enter(self, stack: ExitStack) -> None:
        """Put the wrappers around; they go with `stack`."""
        self._hook(stack, self._model, self._begin)
        self._hook(stack, self._parts.text_model, self._embedded)
        for number, layer in enumerate(self._parts.language_layers):
            layer.forward = self._wrapped(number, layer.forward)
            stack.callback(layer.__dict__.pop, "forward", None)
        if self._scored is not None and self._settings.score in ("attention", "last_token"):
            layer = self._parts.language_layers[self._scored]
            stack.enter_context(observing(layer, self._see))

    @staticmethod
    def _hook(stack: ExitStack, module: nn.Module, function: Callable[..., Any]) -> None:
        stack.callback(module.register_forward_pre_hook(function, with_kwargs=True).remove)

    # Before the model: what is read.

    def _begin(self, _module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        """Note whether this is a prompt, and what its tokens are."""
        cache = named.get("past_key_values")
        self._reading = cache is None or cache.get_seq_length() == 0
        if not self._reading:
            return
        if self._vision is not None:
            self._vision.forget()  # a prompt may be without an image
        ids_BT = arguments[0] if arguments else named.get("input_ids")
        if ids_BT is None:
            raise InputError("pruning: found no input_ids, which tell image tokens from text; expected them")
        mask_BT = named.get("attention_mask")
        if mask_BT is not None and mask_BT.dim() != 2:
            raise InputError(f"pruning: attention_mask has shape {tuple(mask_BT.shape)}, expected (batch, tokens)")
        valid_BT = torch.ones_like(ids_BT, dtype=torch.bool) if mask_BT is None else mask_BT.bool()
        self._is_image_BT = (ids_BT == self._parts.image_token) & valid_BT
        if self._of_text:
            candidates_BT = valid_BT & ~self._is_image_BT
            # The last token gives the answer.
            last_B = valid_BT.shape[1] - 1 - valid_BT.flip(1).to(torch.int8).argmax(1)
            candidates_BT[torch.arange(len(last_B), device=last_B.device), last_B] = False
        else:
            candidates_BT = torch.zeros_like(valid_BT) if self._parts.cross_layers else self._is_image_BT
        prompts = (ids[valid] for ids, valid in zip(ids_BT, valid_BT, strict=True))
        seeds = [seed_of(ids) for ids in prompts] if self._settings.score == "random" else []
        self.tokens = Sequence(candidates_BT, valid_BT, seeds)
        self.states = self._scores_BT = None

    def _embedded(
        self, _module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Drop the features that the vision encoder set to NaN, and replace them by zeros in the inputs."""
        if not self._reading:
            return None
        states, embeds = named.get("cross_attention_states"), named.get("inputs_embeds")
        if states is not None:
            features_BSD = states.reshape(len(self._prompt.alive_BT), -1, states.shape[-1])
            lost_BS = self._lost(features_BSD)
            all_BS = torch.ones_like(lost_BS)
            images_BS = self._seen_states(named, all_BS)
            name, sequence = "cross_attention_states", Sequence(images_BS, all_BS, self._prompt.seeds)
            self.states = sequence
        elif embeds is not None:
            features_BSD, images_BS = embeds, self._image_BT
            lost_BS = self._lost(embeds) & images_BS
            name, sequence = "inputs_embeds", self._prompt
        else:
            return None
        self._check_lost(lost_BS, images_BS)
        sequence.drop(~lost_BS)
        named = {**named, name: features_BSD.masked_fill(lost_BS[..., None], 0)}
        if self._settings.place == "input":
            self._choose_by_features(sequence, named[name], self._text_of(named))
        return arguments, named

    def _lost(self, features_BTD: torch.Tensor) -> torch.Tensor:
        """Return which features the vision encoder dropped, bool (B, T). If it drops none, NaN stays NaN."""
        if self._vision is None:
            return torch.zeros(features_BTD.shape[:2], dtype=torch.bool, device=features_BTD.device)
        lost_BT = features_BTD.isnan().any(-1)
        if self._vision.gave_nan and lost_BT.any():
            raise not_finite(self._model, "features of its vision encoder")
        return lost_BT

    def _check_lost(self, lost_BT: torch.Tensor, image_BT: torch.Tensor) -> None:
        """Raise `InputError` if what the vision encoder dropped is not seen here, or leaves nothing."""
        if self._vision is None or not self._vision.dropped:
            return
        if not lost_BT.any():
            raise InputError(
                f"pruning.layer: found {self._settings.layer}, expected a lower one: the language model gets the "
                "features of a layer of the vision encoder before it"
            )
        if (image_BT.any(1) & ~(image_BT & ~lost_BT).any(1)).any():
            raise InputError(
                f"pruning.place: found {self._settings.place!r}, expected 'input' or 'language': between this model's "
                "vision encoder and its language model all tokens are mixed, so that every one depends on those dropped"
            )

    @staticmethod
    def _seen_states(named: Mapping[str, Any], all_BS: torch.Tensor) -> torch.Tensor:
        """Return the image features that any token may look at: not those of tiles that are padding."""
        mask = named.get("cross_attention_mask")
        return all_BS if mask is None else (mask == 0).any(2).any(1)  # it is added to the logits

    def _text_of(self, named: Mapping[str, Any]) -> torch.Tensor:
        embeds = named.get("inputs_embeds")
        return self._model.get_input_embeddings()(named["input_ids"]) if embeds is None else embeds

    def _choose_by_features(self, sequence: Sequence, features_BSD: torch.Tensor, text_BTD: torch.Tensor) -> None:
        text_BT = self._prompt.alive_BT & ~self._image_BT

        def diverse(row: int, places_n: torch.Tensor, count: int) -> torch.Tensor:
            features_nD = features_BSD[row, places_n]
            if not bool(features_nD.isfinite().all()):
                raise not_finite(self._model, "features of image tokens")
            if self._settings.score == "divprune":
                return selection.divprune(features_nD, count)
            relevance_n = selection.relevance(features_nD, text_BTD[row, text_BT[row]])
            return selection.cdpruner(features_nD, relevance_n, count)

        self._tally.add("image", sequence.choose(self._settings, None, diverse=diverse))

    # Around the layers.

    def _see(
        self, query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, scale: float, causal: bool
    ) -> None:
        """Set the scores, from the attention of the layer before."""
        sequence = self._dropped_from
        if not self._reading or sequence is None:
            return
        left = self._prompt.shortened
        counts_BQ = self._prompt.alive_BT if left is None else left.filled_BK
        if self._settings.score == "last_token":
            places = torch.arange(counts_BQ.shape[1], device=counts_BQ.device)
            counts_BQ = counts_BQ & (places == (counts_BQ * places).amax(1, keepdim=True))
        scores_BK = received(query, key, mask, scale, causal and not self._drops_states, counts_BQ)
        self._scores_BT = _spread(scores_BK, sequence)

    def _choose(self, number: int) -> None:
        """Drop what is to be dropped from this layer on."""
        sequence = self._dropped_from
        if self._scored is not None and number == self._settings.layer and sequence is not None:
            kind = "text" if self._of_text else "image"
            self._tally.add(kind, sequence.choose(self._settings, self._scores_BT, last=not self._of_text))

    def _wrapped(self, number: int, forward: Forward) -> Forward:
        """Return the forward of a layer: of self-attention, or with text tokens as queries and image features as keys.

        The latter sees the features in ``cross_attention_states``.
        """
        is_cross = number in self._parts.cross_layers

        def run(hidden_states: torch.Tensor, *arguments: Any, **named: Any) -> torch.Tensor:
            cache = named.get("past_key_values")
            if not self._reading:
                text, states = self._remembered.get(cache, {}).get(number, (None, None))
                if is_cross and states is not None and named.get("cross_attention_mask") is not None:
                    named["cross_attention_mask"] = _columns(named["cross_attention_mask"], states)
                elif text is not None and cache is not None and not is_cross:
                    length = cache.get_seq_length(number) + hidden_states.shape[1] - text.alive_BT.shape[1]
                    mask = text.later_mask(named.get("attention_mask"), length, hidden_states.shape[1])
                    named["attention_mask"] = mask
                return forward(hidden_states, *arguments, **named)
            self._choose(number)
            text = self._prompt.shortened
            states = self.states.shortened if is_cross and self.states is not None else None
            if text is None and states is None:
                return forward(hidden_states, *arguments, **named)
            if states is not None:
                self._take_states(states, hidden_states, named)
            whole = hidden_states
            if text is not None:
                if is_cross:
                    for name in ("cross_attention_mask", "full_text_row_masked_out_mask"):
                        if named.get(name) is not None:
                            named[name] = text.take(named[name], 2)
                else:
                    named["attention_mask"] = text.mask(named.get("attention_mask"), causal=True)
                self._take_positions(text, named)
                hidden_states = text.take(hidden_states)
            result = forward(hidden_states, *arguments, **named)
            self._remember(cache, number)
            return result if text is None else text.put_back(result, whole)

        return run

    @staticmethod
    def _take_states(states: Shortened, hidden_states: torch.Tensor, named: dict[str, Any]) -> None:
        named["cross_attention_states"] = states.take(named["cross_attention_states"])
        mask = named.get("cross_attention_mask")
        if mask is None and not states.full:
            mask = hidden_states.new_zeros(len(hidden_states), 1, hidden_states.shape[1], states.alive_BT.shape[1])
        named["cross_attention_mask"] = None if mask is None else _columns(mask, states)

    @staticmethod
    def _take_positions(left: Shortened, named: dict[str, Any]) -> None:
        if named.get("position_ids") is not None:
            named["position_ids"] = _sections(left, named["position_ids"], 1)
        if named.get("position_embeddings") is not None:
            named["position_embeddings"] = tuple(_sections(left, each, 2) for each in named["position_embeddings"])

    def _remember(self, cache: Any, number: int) -> None:
        """Remember what a layer's cache holds, for the tokens to come."""
        if cache is None:
            return
        layer = cache.layers[number]
        if type(layer) is not DynamicLayer:
            raise InputError(
                f"pruning: layer {number} has a cache of type {type(layer).__name__}; expected the default one, which "
                "grows with the sequence"
            )
        left, states = self._prompt.shortened, None if self.states is None else self.states.shortened
        self._remembered.setdefault(cache, {})[number] = (left, states)
        if left is not None and number not in self._parts.cross_layers:
            dropped, length_of_cache = left.alive_BT.shape[1] - left.length, layer.get_seq_length
            layer.__dict__["get_seq_length"] = lambda: length_of_cache() + dropped


def _sections(left: Shortened, tensor: torch.Tensor, dims: int) -> torch.Tensor:
    """Return what is left of positions (B or 1, T, ...) of `dims` dimensions after the batch, or of a stack of them.

    GLM-4V gives its layers one set of angles each for time, height and width: (3, B, T, d).
    """
    if tensor.dim() == dims + 1:
        return left.take(tensor)
    if tensor.dim() == dims + 2 and tensor.shape[2] == left.alive_BT.shape[1]:
        return torch.stack([left.take(section) for section in tensor])
    raise InputError(f"pruning: positions of shape {tuple(tensor.shape)}; expected (batch, tokens, ...)")


def _columns(mask: torch.Tensor, states: Shortened) -> torch.Tensor:
    """Return the columns of the features that are left, of an additive mask (B, 1, Q, S)."""
    return states.take(mask, 3).masked_fill(~states.filled_BK[:, None, None], torch.finfo(mask.dtype).min)


def _spread(scores_BK: torch.Tensor, sequence: Sequence) -> torch.Tensor:
    """Return the scores of what is left at the places of the whole sequence; zero elsewhere."""
    left = sequence.shortened
    if left is None:
        return scores_BK
    whole_BT = scores_BK.new_zeros(sequence.alive_BT.shape)
    whole_BT[left.alive_BT] = scores_BK[left.filled_BK]
    return whole_BT
