"""The finishing stage: scales and group levels of all packed layers tuned together, on the whole model's answers.

Methods make the error of each layer small, one after the other. Near the optimum that is the right thing; at two bits
the model is far from it, and what counts is what all errors together do to its answers (Xu et al., "Understanding the
difficulty of low-precision post-training quantization", 2024). So this minimises

    KL(full precision || model)   at the tokens of the calibration replies

over the numbers that the packed formats hold in floating point, with every sign, group and position fixed: minutes of
Adam, the same bits. Every codec takes part through `bivlm.packing.Codec.tunable`.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import BatchFeature, PreTrainedModel, ProcessorMixin

from bivlm.chat import encode, render_dialogue
from bivlm.divergence import Reply, StoredLogProbabilities, kl_by_token, read_reply
from bivlm.errors import InputError
from bivlm.finish_settings import FinishSettings
from bivlm.packing import open_packed
from bivlm.samples import Conversation

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Finished:
    """Packed weights by layer, as long as they were, and the divergence on the batches of the first and last steps.

    `kl_before` and `kl_after` are means over a tenth of the steps, at least one, in nats a token.
    """

    packed: dict[str, torch.Tensor]
    kl_before: float
    kl_after: float


def finish(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    packed: Mapping[str, torch.Tensor],
    conversations: Sequence[Conversation],
    full_precision: StoredLogProbabilities,
    settings: FinishSettings,
    progress: Progress | None = None,
    *,
    together: int | None = None,
) -> Finished:
    """Tune the numbers of `packed` (by the names of linear layers in `model`).

    `model` is the full-precision model; its linear layers get the rebuilt weights and are of no use afterwards.
    `full_precision` holds its log-probabilities on the `conversations`. Beside the model there are the gradients of the
    packed layers' weights, and of one layer at a time what its codec needs. At most `together` conversations of a batch
    go through the model at once, all of them by default; with fewer it takes less memory and longer. Raises
    `InputError` for a layer that the model does not have, ArithmeticError if the divergence becomes NaN.
    """
    layers = [_Tuned(model, name, tensor) for name, tensor in packed.items()]
    optimizer = torch.optim.Adam([move for layer in layers for move in layer.moves.values()], lr=1.0)
    order = _order(len(conversations), settings)
    replies: dict[int, Reply] = {}
    history = []
    model.requires_grad_(False)
    for step in range(settings.steps):
        for layer in layers:
            layer.place()
        for number in order[step]:
            if number not in replies:
                replies[number] = read_reply(model, processor, conversations[number])
        loss = 0.0
        for numbers in _portions(order[step], conversations, together or settings.batch):
            inputs = _inputs(model, processor, [conversations[number] for number in numbers])
            full = [full_precision.of(number, replies[number]) for number in numbers]
            loss += _backward(model, inputs, [replies[number] for number in numbers], full, len(order[step]))
        if not math.isfinite(loss):
            raise ArithmeticError(f"finishing: the divergence is {loss} at step {step}; try a lower learning_rate")
        history.append(loss)
        for layer in layers:
            layer.collect()
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * (1 + math.cos(math.pi * step / settings.steps)) / 2
        optimizer.step()
        optimizer.zero_grad()
        if progress:
            progress(step + 1, settings.steps)
    tenth = max(1, settings.steps // 10)
    return Finished(
        packed={layer.name: layer.packed() for layer in layers},
        kl_before=sum(history[:tenth]) / tenth,
        kl_after=sum(history[-tenth:]) / tenth,
    )


class _Tuned:
    """A packed layer's numbers, each as its first value plus a move in units of its tensor's root mean square."""

    def __init__(self, model: PreTrainedModel, name: str, packed: torch.Tensor) -> None:
        try:
            self._linear = model.get_submodule(name)
        except AttributeError:
            raise InputError(f"finishing: the model has no layer called {name}") from None
        self.name = name
        self._packed = packed.to(model.device)
        self._codec, self._header = open_packed(self._packed, name)
        self._tunable = self._codec.tunable(self._packed, self._header)
        self._units = {key: float(values.square().mean().sqrt()) for key, values in self._tunable.parameters.items()}
        self.moves = {key: nn.Parameter(torch.zeros_like(values)) for key, values in self._tunable.parameters.items()}

    def place(self) -> None:
        """Put the weight that the numbers give now into the model."""
        with torch.no_grad():
            weight = self._tunable.rebuild(self._numbers()).to(self._header.dtype)
        self._linear.weight = nn.Parameter(weight.to(self._linear.weight.dtype))

    def collect(self) -> None:
        """Turn the gradient of the weight into that of the moves; the rounding to the dtype counts as no change."""
        gradient, self._linear.weight.grad = self._linear.weight.grad, None
        if gradient is not None and self.moves:
            self._tunable.rebuild(self._numbers()).backward(gradient.to(torch.float32))

    def packed(self) -> torch.Tensor:
        """The layer with its numbers as they are now."""
        numbers = {key: values.detach() for key, values in self._numbers().items()}
        return self._codec.retuned(self._packed, self._header, numbers).cpu()

    def _numbers(self) -> dict[str, torch.Tensor]:
        return {key: values + self._units[key] * self.moves[key] for key, values in self._tunable.parameters.items()}


def _backward(
    model: PreTrainedModel, inputs: BatchFeature, replies: list[Reply], full: list[torch.Tensor], batch: int
) -> float:
    """The divergence on some conversations of a batch, its gradient added to the weights'.

    A mean over the tokens of each reply, so that a caption counts as much as an answer of one word; as shares of the
    whole batch. `inputs` are padded on the left, so that a reply's places are counted from the end.
    """
    from_end = [reply.inputs["input_ids"].shape[1] - reply.start + 1 for reply in replies]
    logits = model(**inputs, use_cache=False, logits_to_keep=max(from_end)).logits
    loss = logits.new_zeros((), dtype=torch.float32)
    for row, (reply, end, expected) in enumerate(zip(replies, from_end, full, strict=True)):
        first = logits.shape[1] - end
        other = torch.log_softmax(logits[row, first : first + reply.count].to(torch.float32), dim=-1)
        loss = loss + kl_by_token(expected.to(other.device, torch.float32), other).mean() / batch
    loss.backward()
    return float(loss.detach())


def _inputs(model: PreTrainedModel, processor: ProcessorMixin, conversations: list[Conversation]) -> BatchFeature:
    """Conversations with their replies as the model takes them in, padded on the left."""
    images = [conversation.image for conversation in conversations]
    texts = [
        render_dialogue(processor, each.user, each.assistant, image=each.image is not None) for each in conversations
    ]
    return encode(processor, model, texts, images)


def _portions(numbers: list[int], conversations: Sequence[Conversation], together: int) -> Iterator[list[int]]:
    """At most `together` of a step's conversations at once, with and without a picture apart."""
    for with_picture in (True, False):
        some = [number for number in numbers if (conversations[number].image is not None) == with_picture]
        for begin in range(0, len(some), together):
            yield some[begin : begin + together]


def _order(conversations: int, settings: FinishSettings) -> list[list[int]]:
    """The conversations of every step: all of them in a new order each time round."""
    rng, waiting, order = random.Random(settings.seed), [], []
    for _ in range(settings.steps):
        while len(waiting) < settings.batch:
            again = list(range(conversations))
            rng.shuffle(again)
            waiting += again
        order.append(waiting[: settings.batch])
        waiting = waiting[settings.batch :]
    return order
