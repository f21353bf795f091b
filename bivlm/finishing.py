"""The finishing stage: scales and group levels of all packed layers tuned together, on the whole model's answers.

Methods make the error of each layer small, one after the other. Near the optimum that is the right thing; at two bits
the model is far from it, and what counts is what all errors together do to its answers (Xu et al., "Understanding the
difficulty of low-precision post-training quantization", 2024). So this minimises

    KL(full precision || model)   at the tokens of the calibration replies

over the numbers that the packed formats hold in floating point, with every sign, group and position fixed: minutes of
Adam, the same bits. A format with many numbers soon knows a few conversations by heart, so some of them only judge.
Every codec takes part through `bivlm.packing.Codec.tunable`.
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
JUDGEMENTS = 10  # of the weights, between the first step and the last
ATTEMPTS = 3  # from the first weights, with a lower rate if half the steps at the one before did not help
SLOWER = 3.0  # by which the rate is divided


@dataclass(frozen=True)
class Finished:
    """Packed weights by layer, as long as they were, and how far they are from full precision on the judging samples.

    `kl_before` and `kl_after` are in nats a token, a mean over conversations of the mean over each reply's tokens.
    `step` is how many steps were taken to these weights, at `learning_rate`; 0 when none helped, and they are as they
    were.
    """

    packed: dict[str, torch.Tensor]
    kl_before: float
    kl_after: float
    step: int
    learning_rate: float


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
    `full_precision` holds its log-probabilities on the `conversations`. A share of these is not tuned on: on the way
    the divergence on it is measured ten times, and the best weights are kept. When half of the steps have not helped,
    the rate is too high for as many numbers as the format holds, and all begins again at a third of it.

    Beside the model there are the gradients of the packed layers' weights, and of one layer at a time what its codec
    needs. At most `together` conversations of a batch go through the model at once, all of them by default; with fewer
    it takes less memory and longer. Raises `InputError` for a layer that the model does not have and for a single
    conversation, ArithmeticError if the divergence becomes NaN.
    """
    layers = [_Tuned(model, name, tensor) for name, tensor in packed.items()]
    moves = [move for layer in layers for move in layer.moves.values()]
    tuning, judging = _split(len(conversations), settings)
    answers = _Answers(model, processor, conversations, full_precision, together or settings.batch)
    model.requires_grad_(False)
    _place(layers)
    best = _Best(answers.divergence(judging), moves)
    before = best.kl
    for attempt in range(ATTEMPTS):
        rate = settings.learning_rate / SLOWER**attempt
        for step, loss in enumerate(_descent(layers, answers, _order(tuning, settings), rate), 1):
            if not math.isfinite(loss):
                raise ArithmeticError(f"finishing: the divergence is {loss} at step {step}; try a lower learning_rate")
            if progress:
                progress(step, settings.steps)
            if step % max(1, settings.steps // JUDGEMENTS) == 0 or step == settings.steps:
                best.judge(step, answers.divergence(judging))
            if not best.step and step >= settings.steps / 2:
                break
        best.restore()
        if best.step:
            break
        _place(layers)
    return Finished({layer.name: layer.packed() for layer in layers}, before, best.kl, best.step, rate)


def _place(layers: Sequence[_Tuned]) -> None:
    for layer in layers:
        layer.place()


def _descent(layers: Sequence[_Tuned], answers: _Answers, order: list[list[int]], rate: float) -> Iterator[float]:
    """Steps of Adam from what is placed in the model, each placed there; the divergence that each had before it."""
    optimizer = torch.optim.Adam([move for layer in layers for move in layer.moves.values()], lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(order))
    for numbers in order:
        loss = answers.divergence(numbers, backward=True)
        for layer in layers:
            layer.collect()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        _place(layers)
        yield loss


class _Best:
    """The moves with the smallest divergence so far; at first, before any step, none at all."""

    def __init__(self, kl: float, moves: Sequence[nn.Parameter]) -> None:
        self.step, self.kl, self._moves = 0, kl, moves
        self._values = [torch.zeros_like(move) for move in moves]

    def judge(self, step: int, kl: float) -> None:
        if kl < self.kl:
            self.step, self.kl = step, kl
            self._values = [move.detach().clone() for move in self._moves]

    @torch.no_grad()
    def restore(self) -> None:
        for move, value in zip(self._moves, self._values, strict=True):
            move.copy_(value)


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


class _Answers:
    """What the model says to the conversations, against what full precision says."""

    def __init__(
        self,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        conversations: Sequence[Conversation],
        full_precision: StoredLogProbabilities,
        together: int,
    ) -> None:
        self._model, self._processor, self._conversations = model, processor, conversations
        self._full_precision, self._together = full_precision, together
        self._replies: dict[int, Reply] = {}

    def divergence(self, numbers: Sequence[int], *, backward: bool = False) -> float:
        """Mean KL on some conversations in nats a token; with `backward` its gradient is added to the weights'.

        A mean over conversations of the mean over each reply's tokens, so that a caption counts as much as an answer of
        one word.
        """
        total = 0.0
        for some in self._portions(numbers):
            with torch.set_grad_enabled(backward):
                loss = self._sum(some) / len(numbers)
            if backward:
                loss.backward()
            total += float(loss.detach())
        return total

    def _sum(self, numbers: list[int]) -> torch.Tensor:
        """The mean KL of each conversation's reply, added up; the conversations go through the model together."""
        replies = [self._reply(number) for number in numbers]
        # Padding is on the left, so that a reply's places are counted from the end.
        from_end = [reply.inputs["input_ids"].shape[1] - reply.start + 1 for reply in replies]
        logits = self._model(**self._inputs(numbers), use_cache=False, logits_to_keep=max(from_end)).logits
        loss = logits.new_zeros((), dtype=torch.float32)
        for row, (number, reply, end) in enumerate(zip(numbers, replies, from_end, strict=True)):
            first = logits.shape[1] - end
            other = torch.log_softmax(logits[row, first : first + reply.count].to(torch.float32), dim=-1)
            full = self._full_precision.of(number, reply).to(other.device, torch.float32)
            loss = loss + kl_by_token(full, other).mean()
        return loss

    def _reply(self, number: int) -> Reply:
        if number not in self._replies:
            self._replies[number] = read_reply(self._model, self._processor, self._conversations[number])
        return self._replies[number]

    def _inputs(self, numbers: list[int]) -> BatchFeature:
        """Conversations with their replies as the model takes them in, padded on the left."""
        some = [self._conversations[number] for number in numbers]
        texts = [
            render_dialogue(self._processor, each.user, each.assistant, image=each.image is not None) for each in some
        ]
        return encode(self._processor, self._model, texts, [each.image for each in some])

    def _portions(self, numbers: Sequence[int]) -> Iterator[list[int]]:
        """At most so many conversations as go through the model at once, with and without a picture apart."""
        for with_picture in (True, False):
            some = [number for number in numbers if (self._conversations[number].image is not None) == with_picture]
            for begin in range(0, len(some), self._together):
                yield some[begin : begin + self._together]


def _split(conversations: int, settings: FinishSettings) -> tuple[list[int], list[int]]:
    """The conversations to tune on and those to judge by, at least one of each."""
    if conversations < 2:
        raise InputError("finishing: got one conversation, expected at least two, one to tune on and one to judge by")
    numbers = list(range(conversations))
    random.Random(settings.seed).shuffle(numbers)
    judging = min(conversations - 1, max(1, round(settings.judged_share * conversations)))
    return sorted(numbers[judging:]), sorted(numbers[:judging])


def _order(conversations: list[int], settings: FinishSettings) -> list[list[int]]:
    """The conversations of every step: all of them in a new order each time round."""
    rng, waiting, order = random.Random(settings.seed), [], []
    for _ in range(settings.steps):
        while len(waiting) < settings.batch:
            waiting += rng.sample(conversations, len(conversations))
        order.append(waiting[: settings.batch])
        waiting = waiting[settings.batch :]
    return order
