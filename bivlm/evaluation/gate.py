"""Decide whether a candidate may become champion: a recipe's bounds against what was measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from bivlm.evaluation.chance import AtChance
from bivlm.evaluation.paired import LargestLoss, questions_needed
from bivlm.recipe.gate import AccuracyGate, BitsGate, GateSettings


@dataclass(frozen=True)
class Figures:
    """The figures that a gate compares with its bounds."""

    linears: float  # stored bits per weight of the packed linears
    whole_model: float  # stored bits per parameter
    losses: Mapping[str, LargestLoss] | None  # by benchmark; None if nothing was evaluated
    at_chance: Sequence[AtChance] = ()  # benchmarks on which full precision is not above chance


@dataclass(frozen=True)
class Decision:
    """The decision of a gate: a sentence for each bound, with the bound and the figure found."""

    passed: bool
    reasons: tuple[str, ...]
    refused_by: tuple[str, ...]  # the reasons of bounds that are not kept


def decide(gate: GateSettings, figures: Figures) -> Decision:
    """Compare `figures` with every bound of `gate`.

    A benchmark fails if it was not measured with the gate's confidence, or if full precision is at chance on it, so
    that there is nothing to lose.
    """
    found = [*_accuracy(gate.accuracy, figures), *_bits(gate.bits, figures)]
    refused_by = tuple(sentence for kept, sentence in found if not kept)
    return Decision(not refused_by, tuple(sentence for _, sentence in found), refused_by)


def _accuracy(gate: AccuracyGate | None, figures: Figures) -> Iterator[tuple[bool, str]]:
    if gate is None:
        return
    losses, at_chance = figures.losses or {}, {each.task: each for each in figures.at_chance}
    if not losses and gate.benchmarks is None:
        yield False, f"accuracy: nothing was evaluated; at most {gate.largest_loss:g} points may be lost"
    for benchmark in gate.benchmarks or losses:
        found = losses.get(benchmark)
        if found is None or found.confidence != gate.confidence:
            at = "" if found is None else f" with {_percent(gate.confidence)} confidence"
            yield False, f"accuracy on {benchmark}: not measured{at}; at most {gate.largest_loss:g} points may be lost"
        elif benchmark in at_chance:
            yield False, f"accuracy on {at_chance[benchmark]}"
        else:
            yield found.largest <= gate.largest_loss, _loss_in_words(benchmark, found, gate.largest_loss)


def _loss_in_words(benchmark: str, found: LargestLoss, bound: float) -> str:
    said = (
        f"accuracy on {benchmark}: {_beside(found.loss, bound)} points lost on {found.n:,} questions, with "
        f"{_percent(found.confidence)} confidence at most {_beside(found.largest, bound)}"
    )
    if found.largest <= bound:
        return f"{said}: within the {bound:g} that may be lost"
    said = f"{said}: more than the {bound:g} that may be lost"
    if found.loss >= bound:
        return said
    if (needed := questions_needed(found, bound)) is None:
        return f"{said}; too close to the bound for any number of questions to tell"
    return f"{said}; too few questions to tell: answered alike, about {needed:,} would do"


def _bits(gate: BitsGate | None, figures: Figures) -> Iterator[tuple[bool, str]]:
    if gate is None:
        return
    for what, bound, found in (
        ("stored bits in the linears", gate.linears, figures.linears),
        ("stored bits in the whole model", gate.whole_model, figures.whole_model),
    ):
        if bound is not None:
            kept = found <= bound
            side = f"within the bound of {bound:g}" if kept else f"more than the bound of {bound:g}"
            yield kept, f"{what}: {_beside(found, bound, digits=3)}: {side}"


def _beside(value: float, bound: float, digits: int = 2) -> str:
    """Return `value` with as many digits as show on which side of `bound` it lies."""
    while digits < 12 and round(value, digits) == bound != value:
        digits += 1
    return f"{value:.{digits}f}"


def _percent(confidence: float) -> str:
    return f"{100 * confidence:g} %"
