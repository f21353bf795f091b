"""Select the linear layers of a model that a recipe compresses."""

from __future__ import annotations

import difflib

from bivlm.checkpoint.architectures import Component
from bivlm.checkpoint.linears import Linear
from bivlm.errors import InputError
from bivlm.methods import method
from bivlm.recipe.loading import Recipe
from bivlm.untrusted import matching, short

_MAX_PATTERN = 500  # characters of an entry of ``keep``; names of layers are shorter


def select(linears: list[Linear], recipe: Recipe) -> tuple[list[Linear], list[Linear]]:
    """Return (chosen, kept): the linears of the recipe's components less those that its `keep` names, and all others.

    Raises `InputError` for a pattern that matches no linear, a component without linears, a tied head that nothing
    keeps, an expert's matrix where the recipe has to run it as a layer, and a recipe that chooses nothing.
    """
    spared = set().union(*(_matched(pattern, linears) for pattern in recipe.keep))
    for component in recipe.components:
        if not any(linear.component == component for linear in linears):
            raise InputError(
                f"recipe {recipe.name}: components.{component}: the model has no linear layer in it; leave it out"
            )
    chosen = [linear for linear in linears if linear.component in recipe.components and linear.name not in spared]
    for linear in chosen:
        if linear.tied_to is not None:
            raise InputError(
                f"recipe {recipe.name}: {linear.name} shares its tensor with {linear.tied_to}, so that packing it "
                f"would change that too; add {linear.name} to 'keep'"
            )
        if linear.stacked_in is not None and (reason := _not_for_experts(recipe, linear.component)):
            raise InputError(
                f"recipe {recipe.name}: {linear.name} is an expert's matrix, no layer of its own, and {reason}; add "
                f"'re:.*\\.{linear.stacked_in.split('.')[-2]}\\..*' to 'keep'"
            )
    if not chosen:
        raise InputError(f"recipe {recipe.name}: 'keep' leaves no linear layer to compress")
    names = {linear.name for linear in chosen}  # of experts there are tens of thousands
    return chosen, [linear for linear in linears if linear.name not in names]


def _not_for_experts(recipe: Recipe, component: Component) -> str | None:
    """Return why this recipe cannot pack an expert's matrix; None if it can."""
    settings = recipe.components[component]
    if "inputs" in method(settings.method).needs(settings):
        return f"{settings.method} looks at a layer's inputs"
    stage = next((stage for stage in ("search", "finish") if getattr(recipe, stage) is not None), None)
    return f"'{stage}' runs layers" if stage else None


def _matched(pattern: str, linears: list[Linear]) -> set[str]:
    """Return the names of the linears that an entry of ``keep`` names; raise `InputError` if there is none."""
    names = [linear.name for linear in linears]
    if len(pattern) > _MAX_PATTERN:
        raise InputError(f"recipe: keep: {short(pattern)}: expected at most {_MAX_PATTERN} characters")
    if pattern.startswith("re:"):
        found = matching(pattern.removeprefix("re:"), names, f"recipe: keep: {pattern!r}")
    else:
        found = {name for name in names if name == pattern}
    if not found:
        wanted = pattern.removeprefix("re:")
        same_end = [name for name in names if name.rpartition(".")[2] == wanted.rpartition(".")[2]]
        examples = (same_end or difflib.get_close_matches(wanted, names, n=3, cutoff=0))[:3]
        raise InputError(
            f"recipe: keep: {pattern!r} matches no linear layer of the model; names are as in the loaded model, "
            f"for example {', '.join(examples)}"
        )
    return found
