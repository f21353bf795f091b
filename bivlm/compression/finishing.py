"""The finishing stage: tune scales and group levels of all packed layers together, on the whole model's answers.

Methods make the error of each layer small, one after the other. Near the optimum that is the right thing; at two bits
the model is far from it, and what counts is what all errors together do to its answers (Xu et al., "Understanding the
difficulty of low-precision post-training quantization", 2024). So this minimises

    KL(full precision || model)   at the tokens of the calibration replies

over the numbers that the packed formats hold in floating point, with every sign, group and position fixed: minutes of
Adam, the same bits. A format with many numbers soon overfits a few samples, so how far to go is
judged by some that it was not tuned on. Every codec takes part through `bivlm.packing.Codec.tunable`.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import BatchFeature, PreTrainedModel, ProcessorMixin

from bivlm.errors import InputError
from bivlm.evaluation.divergence import StoredLogProbabilities, kl_by_token
from bivlm.numerics.logits import not_finite
from bivlm.packing import open_packed
from bivlm.recipe.finish import FinishSettings
from bivlm.sources.chat_template import encode, render_dialogue
from bivlm.sources.replies import Reply, read_reply
from bivlm.sources.samples import CalibrationSample

Progress = Callable[[int, int], None]
JUDGEMENTS = 10  # of the weights, on the way from the first step to the last
PATIENCE = 4  # judgements in a row without a better one, after which a rate is given up
RATES = 3  # tried from the first weights; without leftovers each only if no step at the one before helped
SLOWER = 3.0  # by which the rate is divided
TABLES = 0.1  # of the rate, for embedding and head: a step moves each of their many numbers


@dataclass(frozen=True)
class Leftover:
    """A tensor that stays in floating point: its name in the loaded model, and its numbers as they are stored."""

    name: str
    stored: torch.Tensor


@dataclass(frozen=True)
class Finished:
    """Packed weights by layer, as long as they were, and the effect of tuning on samples that were not tuned on.

    `kl_before` and `kl_after` are in nats per token, a mean over samples of the mean over each reply's tokens, or with
    leftovers over all tokens.
    `steps` were taken, at first at `learning_rate`; 0 if none helped, and the weights are as they were. `leftovers` are
    tuned tensors by name on disk, of the stored dtype; there are none if no step was taken.
    """

    packed: dict[str, torch.Tensor]
    leftovers: dict[str, torch.Tensor]
    kl_before: float
    kl_after: float
    steps: int
    learning_rate: float


def finish(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    packed: Mapping[str, torch.Tensor],
    samples: Sequence[CalibrationSample],
    full_precision: StoredLogProbabilities,
    settings: FinishSettings,
    progress: Progress | None = None,
    *,
    leftovers: Mapping[str, Leftover] | None = None,
    together: int | None = None,
) -> Finished:
    """Tune the numbers of `packed` (by the names of linear layers in `model`).

    `model` is the full-precision model; its linear layers get the rebuilt weights and are of no use afterwards.
    `full_precision` holds its log-probabilities on the `samples`. The number of steps is chosen by tuning on a
    part of these and judging by the others: as many as leave the smallest divergence there, at a third of the rate
    where that is too high for as many numbers as the format holds. Then as many steps are taken on all.

    `leftovers` by name on disk are tuned, too; several names may be of one parameter, which moves as one. They are many
    numbers, and how far they should go depends on the damage: all rates are tried, and the best is taken.

    Beside the model, the gradients of the packed layers' weights are in memory, and what the codec of one layer at a
    time needs; of a leftover its stored numbers, moves, gradient and Adam's two moments. At most `together` samples of
    a batch go through the model at once, all of them by default; with fewer it takes less memory and longer. Raises
    `InputError` for a layer or leftover that the model does not have and for a single sample, ArithmeticError if the
    divergence is or becomes NaN.
    """
    model.requires_grad_(False)
    layers = [_Tuned(model, name, tensor) for name, tensor in packed.items()]
    kept = _kept(model, leftovers or {})
    tuned: list[_Tuned | _Kept] = [*layers, *kept]
    answers = _Answers(model, processor, samples, full_precision, together or settings.batch)
    report = progress or (lambda done, total: None)
    tuning, judging = _split(len(samples), settings)
    _restart(tuned)
    judge = _Judge(answers, judging, by_token=bool(kept))
    before = judge()
    if not math.isfinite(before):
        raise not_finite(model, f"the divergence of its packed layers is {before} before the first step")
    best, steps = before, 0
    for attempt in range(RATES):
        tried = settings.learning_rate / SLOWER**attempt
        descent = _descent(tuned, answers, tuning, settings, tried)
        lowest, found = _lowest(descent, judge, before, settings.steps, report)
        _restart(tuned)
        if lowest < best or not steps:
            best, steps, rate = lowest, found, tried
        if steps and not kept:
            break
    for step in itertools.islice(_descent(tuned, answers, range(len(samples)), settings, rate), steps):
        report(settings.steps + step, 2 * settings.steps)
    report(2 * settings.steps, 2 * settings.steps)
    moved = {name: values for each in kept for name, values in each.stored().items()} if steps else {}
    return Finished({layer.name: layer.packed() for layer in layers}, moved, before, best, steps, rate)


def _lowest(descent: Iterator[int], judge: _Judge, before: float, steps: int, report: Progress) -> tuple[float, int]:
    """Return the smallest divergence on the way down and after how many steps it was; stop where it only rises."""
    lowest, found, every = before, 0, max(1, steps // JUDGEMENTS)
    for step in descent:
        report(step, 2 * steps)
        if step % every == 0 or step == steps:
            judged = judge()
            if judged < lowest:
                lowest, found = judged, step
            if step - found >= PATIENCE * every:
                break
    return lowest, found


def _descent(
    tuned: Sequence[_Tuned | _Kept], answers: _Answers, numbers: Sequence[int], settings: FinishSettings, rate: float
) -> Iterator[int]:
    """Run steps of Adam on some of the samples, from what is placed in the model; yield the number of each, from 1."""
    optimizer = torch.optim.Adam([move for each in tuned for move in each.moves.values()], lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps)
    for step, batch in enumerate(_order(numbers, settings), 1):
        loss = answers.divergence(batch, backward=True)
        if not math.isfinite(loss):
            raise ArithmeticError(f"finishing: the divergence is {loss} at step {step}; try a lower learning_rate")
        for each in tuned:
            each.collect()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        for each in tuned:
            each.place()
        yield step


@torch.no_grad()
def _restart(tuned: Sequence[_Tuned | _Kept]) -> None:
    """Put the first weights back into the model."""
    for each in tuned:
        for move in each.moves.values():
            move.zero_()
        each.place()


def _kept(model: PreTrainedModel, leftovers: Mapping[str, Leftover]) -> list[_Kept]:
    """Return what moves: one for each parameter of the model, under all its names.

    A parameter that is stored twice, in different dtypes, is left out: rounding would make two of it.
    """
    stored: dict[nn.Parameter, dict[str, torch.Tensor]] = {}
    for disk_name, leftover in leftovers.items():
        try:
            parameter = model.get_parameter(leftover.name)
        except AttributeError:
            raise InputError(f"finishing: the model has no parameter called {leftover.name}") from None
        stored.setdefault(parameter, {})[disk_name] = leftover.stored
    return [
        _Kept(parameter, copies)
        for parameter, copies in stored.items()
        if len({tensor.dtype for tensor in copies.values()}) == 1
    ]


class _Judge:
    """Gives the divergence on samples that are not tuned on: a mean over samples or, `by_token`, over all tokens.

    By token it is what the report gives, and long replies decide. Short ones, such as answers to questions, must not
    pay for that: it is infinite where the mean over samples is above the first.
    """

    def __init__(self, answers: _Answers, numbers: Sequence[int], *, by_token: bool) -> None:
        self._answers, self._numbers, self._by_token = answers, numbers, by_token
        self._first: float | None = None

    def __call__(self) -> float:
        if not self._by_token:
            return self._answers.divergence(self._numbers)
        by_token, by_sample = self._answers.two_means(self._numbers)
        self._first = by_sample if self._first is None else self._first
        return by_token if by_sample <= self._first else math.inf


class _Tuned:
    """A packed layer's numbers, each as its first value plus a move in units of its tensor's root mean square."""

    def __init__(self, model: PreTrainedModel, name: str, packed: torch.Tensor) -> None:
        try:
            self._linear: Any = model.get_submodule(name)
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
        """Return the packed layer with its numbers as they are now."""
        numbers = {key: values.detach() for key, values in self._numbers().items()}
        return self._codec.retuned(self._packed, self._header, numbers).cpu()

    def _numbers(self) -> dict[str, torch.Tensor]:
        return {key: values + self._units[key] * self.moves[key] for key, values in self._tunable.parameters.items()}


class _Kept:
    """A leftover: its first numbers plus a move in units of their root mean square, of tables a tenth of it.

    It is rounded to the stored dtype whenever it is placed, which counts as no change in the gradient.
    """

    def __init__(self, parameter: nn.Parameter, copies: dict[str, torch.Tensor]) -> None:
        self._parameter, self._names = parameter.requires_grad_(True), list(copies)
        self._first = next(iter(copies.values())).to(parameter.device)
        self._unit = float(self._first.to(torch.float32).square().mean().sqrt()) * (
            TABLES if parameter.dim() > 1 else 1
        )
        self.moves = {"": nn.Parameter(torch.zeros(self._first.shape, device=parameter.device))}

    @torch.no_grad()
    def place(self) -> None:
        """Put the numbers as they would be stored now into the model."""
        self._parameter.copy_(self._rounded())

    def collect(self) -> None:
        """Turn the gradient of the parameter into that of the move."""
        gradient, self._parameter.grad = self._parameter.grad, None
        self.moves[""].grad = None if gradient is None else gradient.to(torch.float32) * self._unit

    def stored(self) -> dict[str, torch.Tensor]:
        """Return the tensor as it is stored, under each of its names on disk."""
        return dict.fromkeys(self._names, self._rounded().cpu())

    @torch.no_grad()
    def _rounded(self) -> torch.Tensor:
        return (self._first.to(torch.float32) + self._unit * self.moves[""]).to(self._first.dtype)


class _Answers:
    """The model's answers to the samples, against those of full precision."""

    def __init__(
        self,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        samples: Sequence[CalibrationSample],
        full_precision: StoredLogProbabilities,
        together: int,
    ) -> None:
        self._model, self._processor, self._samples = model, processor, samples
        self._full_precision, self._together = full_precision, together
        self._replies: dict[int, Reply] = {}

    def divergence(self, numbers: Sequence[int], *, backward: bool = False) -> float:
        """Return the mean KL on some samples in nats per token; with `backward` add its gradient to the weights'.

        It is the mean over samples of the mean over each reply's tokens: a caption counts as much as a one-word answer.
        """
        total = 0.0
        for some in self._portions(numbers):
            with torch.set_grad_enabled(backward):
                loss = self._sum(some) / len(numbers)
            if backward:
                loss.backward()
            total += float(loss.detach())
        return total

    @torch.no_grad()
    def two_means(self, numbers: Sequence[int]) -> tuple[float, float]:
        """Return the mean KL on some samples over all tokens of their replies, and that over samples."""
        found = [divergence for some in self._portions(numbers) for divergence in self._by_token(some)]
        return float(torch.cat(found).mean()), float(torch.stack([each.mean() for each in found]).mean())

    def _sum(self, numbers: list[int]) -> torch.Tensor:
        """Return the sum of the mean KL of each sample's reply, added one by one: the order decides the last bits."""
        first, *others = (divergence.mean() for divergence in self._by_token(numbers))
        return sum(others, first)

    def _by_token(self, numbers: list[int]) -> list[torch.Tensor]:
        """Return the KL at each token of the reply, by sample; the samples go through the model together."""
        replies = [self._reply(number) for number in numbers]
        # Padding is on the left, so that a reply's places are counted from the end.
        from_end = [reply.inputs["input_ids"].shape[1] - reply.start + 1 for reply in replies]
        logits = self._model(**self._inputs(numbers), use_cache=False, logits_to_keep=max(from_end)).logits
        found = []
        for row, (number, reply, end) in enumerate(zip(numbers, replies, from_end, strict=True)):
            first = logits.shape[1] - end
            other = torch.log_softmax(logits[row, first : first + reply.count].to(torch.float32), dim=-1)
            full = self._full_precision.of(number, reply).to(other.device, torch.float32)
            found.append(kl_by_token(full, other))
        return found

    def _reply(self, number: int) -> Reply:
        if number not in self._replies:
            self._replies[number] = read_reply(self._model, self._processor, self._samples[number])
        return self._replies[number]

    def _inputs(self, numbers: list[int]) -> BatchFeature:
        """Return samples with their replies as the model takes them, padded on the left."""
        some = [self._samples[number] for number in numbers]
        texts = [
            render_dialogue(self._processor, each.user, each.assistant, image=each.image is not None) for each in some
        ]
        return encode(self._processor, self._model, texts, [each.image for each in some])

    def _portions(self, numbers: Sequence[int]) -> Iterator[list[int]]:
        """Yield batches that go through the model at once, samples with and without an image apart."""
        for with_image in (True, False):
            some = [number for number in numbers if (self._samples[number].image is not None) == with_image]
            for begin in range(0, len(some), self._together):
                yield some[begin : begin + self._together]


def _split(samples: int, settings: FinishSettings) -> tuple[list[int], list[int]]:
    """Return the samples to tune on and those to judge by, at least one of each."""
    if samples < 2:
        raise InputError("finishing: got one sample, expected at least two, one to tune on and one to judge by")
    numbers = list(range(samples))
    random.Random(settings.seed).shuffle(numbers)
    judging = min(samples - 1, max(1, round(settings.judging_share * samples)))
    return sorted(numbers[judging:]), sorted(numbers[:judging])


def _order(numbers: Sequence[int], settings: FinishSettings) -> list[list[int]]:
    """Return the samples of every step: all of them, in a new order each time round."""
    rng, order = random.Random(settings.seed), []
    waiting: list[int] = []
    for _ in range(settings.steps):
        while len(waiting) < settings.batch:
            waiting += rng.sample(numbers, len(numbers))
        order.append(waiting[: settings.batch])
        waiting = waiting[settings.batch :]
    return order
