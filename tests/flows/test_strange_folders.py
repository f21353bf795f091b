"""Whatever a checkpoint's folder holds, a command does its work or says in a message what is wrong."""

import random
import shutil

import pytest
from strange_inputs import Tally, strange_folder, strange_recipe

from bivlm.checkpoint.linears import anatomy
from bivlm.checkpoint.reading import Checkpoint
from bivlm.checkpoint.writing import check_output
from bivlm.compression.embeddings import chosen_tables
from bivlm.evaluation.generation import load_processor
from bivlm.recipe.loading import load_recipe, parse_recipe, shipped_recipes
from bivlm.recipe.selection import select
from bivlm.reports.bits import bits_of
from bivlm.reports.inspection import inspect
from bivlm.reports.lineage import read_lineage, verify
from bivlm.reports.pushing import package
from flows.cli.console import print_lineage
from flows.estimates import refuse_what_cannot_fit
from flows.runners import parse_runner

RECIPE = {"name": "r", "format": 1, "components": {"language": {"method": "bivlm", "groups": 2, "p_max": 0.05}}}


def estimated(folder, recipe=None):
    """As ``compress --estimate``, but for the probe of time."""
    recipe = recipe or parse_recipe(RECIPE)
    checkpoint = Checkpoint.open(folder, recipe.modules)
    check_output(checkpoint, folder.parent / "output")
    parts = anatomy(checkpoint)
    refuse_what_cannot_fit(checkpoint, parts, recipe, 0, parse_runner("threads", None), [])


def recorded(folder):
    lineage = read_lineage(folder)
    print_lineage("it", lineage, verify(lineage, folder))


COMMANDS = {
    "inspect": inspect,
    "bits": bits_of,
    "compress --estimate": estimated,
    "lineage": recorded,
    "push --dry-run": lambda folder: package(folder, "maker/model"),
    "evaluate": load_processor,
}


def follow_no_link(tally, name, folder):
    """Whether everything that is read, hashed or copied of the folder lies in it."""
    try:
        checkpoint = Checkpoint.open(folder)
    except ValueError:
        return
    for file in (*checkpoint.weight_files, *checkpoint.side_files, *checkpoint.licence_files):
        if not file.resolve().is_relative_to(folder.resolve()):
            tally.note("links followed", f"{name}: {file}")


def try_folders(count, goods, tmp_path, first=0):
    tally = Tally()
    for number in range(first, first + count):
        rng = random.Random(number)
        outside = tmp_path / "outside"
        outside.mkdir()
        folder = strange_folder(rng.choice(goods), tmp_path / "strange", outside, rng)
        for command, run in COMMANDS.items():
            with tally.case(f"folder {number}, {command}"):
                run(folder)
        follow_no_link(tally, f"folder {number}", folder)
        shutil.rmtree(folder)
        shutil.rmtree(outside)
    tally.report(f"{count:,} folders, {len(COMMANDS)} commands each")


def try_recipes(count, goods, model, tmp_path, first=0):
    tally = Tally()
    checkpoint = Checkpoint.open(model)
    parts = anatomy(checkpoint)
    for number in range(first, first + count):
        rng = random.Random(number)
        (tmp_path / "recipe.yaml").write_bytes(strange_recipe(rng.choice(goods), rng))
        with tally.case(f"recipe {number}"):
            recipe = load_recipe(tmp_path / "recipe.yaml")
            recipe.canonical()
            chosen, _ = select(parts.linears, recipe)
            chosen_tables(parts, recipe.tables, chosen)
            refuse_what_cannot_fit(checkpoint, parts, recipe, 0, parse_runner("threads", None), [])
    tally.report(f"{count:,} recipes")


@pytest.fixture(scope="module")
def folders(tiny_llava, compressed):
    return [tiny_llava, compressed.output]


@pytest.fixture(scope="module")
def recipes(small_recipe):
    """Recipes with every part that there is, small and large."""
    full = {
        **small_recipe,
        "keep": ["lm_head", r"re:model\.vision_tower\..*\.fc[12]"],
        "tables": {"tokens": 8},
        "budget": {"bits": 2.0},
        "gate": {"accuracy": {"largest_loss": 1.0}},
    }
    parse_recipe(full)
    return [small_recipe, full, *(load_recipe(name).canonical() for name in shipped_recipes())]


@pytest.fixture
def quietly(capfd):
    """What the commands print stays out of the way; the counts are shown at the end."""
    yield
    last = [line for line in capfd.readouterr().out.splitlines() if "tracebacks" in line]
    with capfd.disabled():
        print("\n".join(last))


def test_a_hundred_strange_folders(folders, tmp_path, quietly):
    try_folders(100, folders, tmp_path, first=1000)


@pytest.mark.slow
def test_a_thousand_strange_folders(folders, tmp_path, quietly):
    try_folders(1000, folders, tmp_path)


def test_a_hundred_strange_recipes(recipes, tiny_llava, tmp_path, quietly):
    try_recipes(100, recipes, tiny_llava, tmp_path, first=1000)


@pytest.mark.slow
def test_a_thousand_strange_recipes(recipes, tiny_llava, tmp_path, quietly):
    try_recipes(1000, recipes, tiny_llava, tmp_path)
