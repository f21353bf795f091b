"""Many recipes on one model: a compression for each, then a table and a figure of quality against stored bits."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefect import flow
from rich.console import Console

from bivlm.checkpoint.outputs import check_replaceable
from bivlm.errors import GateNotPassed, InputError, describe
from bivlm.recipe.calibration import held_out_samples
from bivlm.recipe.finish import FinishSettings
from bivlm.recipe.loading import Recipe, load_recipe
from bivlm.reports.leaderboard.ranking import board, fingerprint
from bivlm.reports.table_folders import check_tables
from bivlm.workspace.places import Place, check_places, output_folder, output_place
from bivlm.workspace.stores.location import default_workspace
from flows.compress import compress_flow
from tasks.leaderboard import (
    BOARD_FILES,
    check_same_linears,
    entry_of,
    failed_entry,
    full_precision_of,
    log_board,
    write_board,
)
from tasks.runtime.policy import is_out_of_memory


@flow(name="leaderboard", flow_run_name="leaderboard-{output}", persist_result=False)
def leaderboard_flow(
    model: str,
    recipes: list[str],
    output: str,
    revision: str | None = None,
    workspace: str | None = None,
    questions: int | None = None,
    finish: bool = False,
) -> dict[str, Any]:
    """Compress `model` by every one of `recipes` (shipped names or files) and compare what came of it.

    The packed checkpoints go into folders of their recipes' names in `output`, the board beside them as ``board.json``,
    ``board.md``, ``board.csv`` and ``board.svg``. A recipe that cannot be carried out is listed with the reason. A
    killed run resumes; the same request again gives the same board. `finish` adds the finishing
    stage to every recipe that has none. Returns ``{"board", "fingerprint", "output", "run_id"}``. Raises `InputError`
    for recipes that cannot be compared: two of one name, other benchmarks, other linears.
    """
    loaded = [finished(load_recipe(name)) if finish else load_recipe(name) for name in recipes]
    _check(loaded)
    by_name = {recipe.name: recipe for recipe in loaded}
    place = output_folder(output)
    check_outputs(place, "board", by_name, model, workspace)
    check_tables(place, BOARD_FILES.__contains__, BOARD_FILES)
    workspace = workspace or default_workspace()
    arguments = {"revision": revision, "workspace": workspace, "questions": questions}
    attempts = list(attempt_each(model, by_name, place, _in_short, **arguments))
    results = {each.name: each.result for each in attempts if each.result is not None}
    entries = [
        failed_entry(by_name[each.name], each.error) if each.error else entry_of(by_name[each.name], each.result)
        for each in attempts
    ]
    if not results:
        raise InputError(f"no recipe could be carried out; the first failed with: {entries[0].failed}")
    check_same_linears(results)
    first = next(iter(results.values()))
    made = board(
        entries,
        full_precision_of(first),
        model={"name": first["model_name"], **first["base_model"]},
        chance=first["evaluation"]["chance"],
        measured_on=measured_on(by_name),
    )
    write_board(made, str(place))
    run_id = log_board(made, str(place), workspace)
    return {"board": made, "fingerprint": fingerprint(made), "output": str(place), "run_id": run_id}


@dataclass(frozen=True)
class Attempt:
    """What a compression by one recipe returned, or the error for which the recipe cannot be carried out."""

    name: str
    result: dict[str, Any] | None = None
    error: Exception | None = None


def check_outputs(place: Path, what: str, recipes: Mapping[str, Recipe], model: str, workspace: str | None) -> None:
    """Raise `InputError` unless every recipe can write a folder of its name in `place`, which is the `what`'s."""
    outputs = [place / name for name in recipes]
    written = [Place(what, place, written=True), *map(output_place, outputs)]
    check_places(written, [model], workspace, [name for each in recipes.values() for name in each.data()])
    for each in outputs:
        check_replaceable(each, Path(model) if Path(model).is_dir() else None)


def measured_on(recipes: Mapping[str, Recipe]) -> str:
    """Return the samples that the KL is measured on, which are the same for all of the recipes."""
    return held_out_samples(next(iter(recipes.values())).canonical()["calibration"])


def attempt_each(
    model: str, recipes: Mapping[str, Recipe], place: Path, shorten: Callable[[dict[str, Any]], str], **arguments: Any
) -> Iterator[Attempt]:
    """Compress `model` by one recipe after another into folders of their names in `place`, and print a line for each.

    ``shorten(result)`` is what the line says. An error that is not the recipe's ends it all. What a recipe's gate
    refuses was measured as well as any other.
    """
    console = Console(stderr=True)

    def say(line: str) -> None:
        console.print(line, highlight=False, markup=False, soft_wrap=True)

    say(f"KL in nats per token, on {measured_on(recipes)}")
    for number, (name, recipe) in enumerate(recipes.items(), start=1):
        started = time.perf_counter()
        output = str(place / name)
        try:
            attempt = Attempt(name, compress_flow(model, recipe.canonical(), output, quiet=True, **arguments))
        except GateNotPassed as refused:
            attempt = Attempt(name, refused.result)
        except Exception as error:
            if not is_the_recipes(error):
                raise
            attempt = Attempt(name, error=error)
        said = f"failed: {describe(attempt.error)};" if attempt.error else shorten(attempt.result)
        say(f"{number:>3} of {len(recipes)}  {name:<28} {said}  {time.perf_counter() - started:4.0f} s")
        yield attempt


def finished(recipe: Recipe) -> Recipe:
    """Return the recipe with the finishing stage; itself if it has one."""
    if recipe.finish is not None:
        return recipe
    return recipe.model_copy(update={"name": f"{recipe.name}-finished", "finish": FinishSettings()})


def _check(recipes: Sequence[Recipe]) -> None:
    """Raise `InputError` for recipes that cannot be compared, before hours are spent on them."""
    if not recipes:
        raise InputError("recipes: found none, expected at least one name or file")
    names = [recipe.name for recipe in recipes]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise InputError(f"recipes: two are called {twice!r}; the names must differ")
    for recipe in recipes:
        if recipe.name.lower() in BOARD_FILES:
            raise InputError(f"recipe {recipe.name}: its folder would lie where the board's own file does; rename it")
        if not recipe.evaluation:
            raise InputError(f"recipe {recipe.name}: 'evaluation' is empty; a board needs at least one benchmark")
        if recipe.evaluation != recipes[0].evaluation:
            raise InputError(
                f"recipe {recipe.name} asks {', '.join(recipe.evaluation)}, {names[0]} asks "
                f"{', '.join(recipes[0].evaluation)}: everything on a board must be asked the same questions"
            )
        if recipe.calibration.held_out_selection() != recipes[0].calibration.held_out_selection():
            raise InputError(
                f"recipe {recipe.name} has other held-out samples than {names[0]}: the divergence is measured on them, "
                "which must be the same for all; expected one source, seed and number of them, and as many "
                "calibration samples or 64 and more"
            )


def is_the_recipes(error: Exception) -> bool:
    """Return whether the recipe cannot be carried out; any other error would befall the next recipe, too."""
    return isinstance(error, InputError | ArithmeticError) or is_out_of_memory(error)


def _in_short(result: dict[str, Any]) -> str:
    accuracies = [found["metrics"]["accuracy"] for found in result["evaluation"]["packed"].values()]
    mean = sum(accuracies) / len(accuracies)
    bits, kl = result["bits"]["linears"]["stored"], result["evaluation"]["kl"]
    return f"{bits:6.3f} bits  accuracy {mean:5.1f}  KL {kl:6.3f}"
