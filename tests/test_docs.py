"""The documentation: short, its links lead somewhere, and what it names exists."""

import argparse
import ast
import re
import shlex
from functools import cache
from pathlib import Path

import pytest
import yaml

from benchmarks.lines import words_by_page

ROOT = Path(__file__).parents[1]
MOST_WORDS = 15_000
INDEX = ROOT / "docs" / "README.md"
OF_OTHERS = {"--model_args", "--resume"}  # options of lmms-eval and of the training
OURS = ("bivlm", "tasks", "flows", "infra", "benchmarks")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
CODE = re.compile(r"`([^`\n]+)`")
RECIPE = re.compile(r"(bivlm-(n\d|1bit|paper)|(rtn|gptq|awq)-w\d|q-vlm$|pb-llm$|arb-rc$|billm$|hbllm(-|$))[\w-]*")
PATH = re.compile(r"(bivlm|tasks|flows|tests|infra|benchmarks|docs|\.github)/[\w./-]*")


@cache
def pages() -> dict[str, str]:
    """The text of every Markdown file by its path."""
    found = [*ROOT.glob("*.md")]
    for folder in ("docs", "tests", ".github", *OURS):
        found += (ROOT / folder).rglob("*.md")
    return {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in sorted(found)}


def fences(page: str, *languages: str) -> list[str]:
    return [text for language, text in FENCE.findall(pages()[page]) if language in languages]


def prose(page: str) -> str:
    """The page without its fenced blocks."""
    return FENCE.sub("", pages()[page])


def spans(page: str) -> list[str]:
    """What stands in backticks, also where a line ends within."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(page))]


def anchors(page: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands(page: str) -> list[list[str]]:
    """Every command line of the page's shell blocks, in words."""
    lines = "\n".join(fences(page, "sh", "")).replace("\\\n", " ").splitlines()
    found = []
    for line in lines:
        lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;")
        lexer.whitespace_split = True
        words = list(lexer)
        while words:
            end = next((at for at, word in enumerate(words) if set(word) <= set("&|;")), len(words))
            if words[:end]:
                found.append(words[:end])
            words = words[end + 1 :]
    return found


@cache
def parser() -> argparse.ArgumentParser:
    from flows.cli.main import _parser

    return _parser()


@cache
def subcommands() -> dict[str, argparse.ArgumentParser]:
    (action,) = (each for each in parser()._actions if isinstance(each, argparse._SubParsersAction))
    return dict(action.choices)


@cache
def recipes() -> set[str]:
    return {path.stem for path in (ROOT / "bivlm" / "recipe" / "recipes").glob("*.yaml")}


def module_path(name: str) -> Path | None:
    """The file that ``import name`` reads."""
    path = ROOT.joinpath(*name.split("."))
    return next((each for each in (path.with_suffix(".py"), path / "__init__.py") if each.is_file()), None)


def program(name: str) -> str:
    """The source that ``python -m name`` runs; "" for a module that would only be imported, which does nothing."""
    package, module = (ROOT.joinpath(*name.split(".")) / "__main__.py", module_path(name))
    if package.is_file():
        return package.read_text()
    source = module.read_text() if module else ""
    return source if '__name__ == "__main__"' in source else ""


every_page = pytest.mark.parametrize("page", pages())


def test_the_documentation_stays_short():
    words = words_by_page(ROOT)
    assert sum(words.values()) < MOST_WORDS, words


@every_page
def test_every_link_leads_to_a_file_and_a_heading(page):
    wrong = []
    for target in LINK.findall(prose(page)):
        if re.match(r"\w+:", target):
            continue
        path, _, anchor = target.partition("#")
        found = (ROOT / page).parent.joinpath(path).resolve() if path else ROOT / page
        if not found.exists() or (anchor and anchor not in anchors(str(found.relative_to(ROOT)))):
            wrong.append(target)
    assert wrong == []


def test_the_index_lists_every_page():
    linked = {INDEX.parent.joinpath(target.partition("#")[0]).resolve() for target in LINK.findall(INDEX.read_text())}
    missing = {page for page in pages() if ROOT / page not in linked | {INDEX}}
    assert missing == set()


def test_every_drawing_and_table_of_docs_is_shown_somewhere():
    linked = {
        (ROOT / page).parent.joinpath(target).resolve() for page in pages() for target in LINK.findall(pages()[page])
    }
    drawn = {path for kind in ("svg", "png", "csv") for path in (ROOT / "docs").glob(f"*.{kind}")}
    assert drawn - linked == set()


@every_page
def test_prose_is_wrapped_at_100_columns(page):
    if page == "bivlm/reference/checkpoint/README.md":  # made by a command, at 120
        return
    long = [line for line in prose(page).splitlines() if len(line) > 100 and " | " not in line]
    assert long == []


@every_page
def test_every_command_of_bivlm_is_one_that_it_takes(page, capsys):
    wrong = []
    for words in commands(page):
        if words[0].removeprefix(".venv/bin/") != "bivlm":
            continue
        try:
            parser().parse_args(words[1:])
        except SystemExit:
            wrong.append((" ".join(words), capsys.readouterr().err))
    assert wrong == []


@every_page
def test_every_command_and_option_in_a_sentence_exists(page):
    """In a sentence a command may be a part of one: its name and its options are looked at."""
    wrong = []
    for span in spans(page):
        words = span.split()
        if words[0] == "bivlm" and len(words) > 1 and words[1].isalpha() and words[1].islower():
            known = subcommands().get(words[1])
            options = {"--help"} if known is None else set(known._option_string_actions)
            if known is None or {word for word in words if word.startswith("--")} - options:
                wrong.append(span)
        elif words[0].startswith("--"):
            somewhere = {option for known in subcommands().values() for option in known._option_string_actions}
            if words[0] not in somewhere | OF_OTHERS:
                wrong.append(span)
    assert wrong == []


@every_page
def test_every_recipe_that_is_named_ships(page):
    named = {span for span in spans(page) if RECIPE.fullmatch(span) and not span.endswith("-finished")}
    for words in commands(page):
        if words[0].removeprefix(".venv/bin/") == "bivlm":
            options = vars(parser().parse_args(words[1:]))
            named |= {options.get("recipe"), *(options.get("recipes") or ())}
    for text in fences(page, "yaml"):
        for model in (yaml.safe_load(text) or {}).get("models", ()):
            named |= {*model.get("recipes", ()), *model.get("leaderboard", ())}
    named -= {None, "all"}
    assert {name for name in named if not name.isupper()} - recipes() == set()


@every_page
def test_every_target_of_make_exists(page):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {words[1] for words in commands(page) if words[0] == "make"}
    named |= {span.split()[1] for span in spans(page) if span.startswith("make ")}
    assert named - targets == set()


@every_page
def test_every_module_that_is_run_exists_and_knows_its_options(page):
    wrong = []
    for words in [*commands(page), *(span.split() for span in spans(page))]:
        if "-m" not in words or not Path(words[0]).name.startswith("python"):
            continue
        name, *arguments = words[words.index("-m") + 1 :]
        if name.partition(".")[0] not in OURS or name.endswith(".NAME"):
            continue
        source = program(name)
        options = [word for word in arguments if word.startswith("--")]
        if not source or any(f'"{option}"' not in source for option in options):
            wrong.append(" ".join(words))
    assert wrong == []


def test_every_module_that_code_runs_is_a_program():
    """`python -m` of a module without a main part succeeds and does nothing, which no exit code shows."""
    found = {
        name
        for floor in (*OURS, "tests")
        for path in (ROOT / floor).rglob("*.py")
        for name in re.findall(r'"-m", "([\w.]+)"', path.read_text())
        if name.partition(".")[0] in (*OURS, "tests")
    }
    assert len(found) >= 4
    assert {name for name in found if not program(name)} == set()


@every_page
def test_every_file_and_module_in_a_sentence_exists(page):
    wrong = {span for span in spans(page) if PATH.fullmatch(span) and not (ROOT / span).exists()}
    wrong |= {span for span in spans(page) if re.fullmatch(r"benchmarks\.\w+", span) and not module_path(span)}
    assert wrong == set()


def test_every_measurement_in_the_checklist_exists():
    section = prose("CONTRIBUTING.md").partition("## Measurements")[2].partition("\n\n`python -m")[0]
    named = [span for span in CODE.findall(section) if re.fullmatch(r"[a-z_]+", span)]
    assert len(named) >= 11
    assert [name for name in named if not module_path(f"benchmarks.{name}")] == []


@every_page
def test_every_import_in_the_examples_works(page):
    for text in fences(page, "python"):
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.module.partition(".")[0] in OURS:
                path = module_path(node.module)
                assert path is not None, node.module
                assert all(re.search(rf"\b{alias.name}\b", path.read_text()) for alias in node.names)


@every_page
def test_every_setting_of_a_recipe_in_the_examples_is_valid(page):
    """A part of a recipe is put onto whole ones; a search is of methods without inputs, whose settings differ."""
    from bivlm.errors import InputError
    from bivlm.recipe.loading import Recipe, parse_recipe

    for text in fences(page, "yaml"):
        part = yaml.safe_load(text)
        if not part.keys() <= Recipe.model_fields.keys() - {"format"}:
            continue
        problems = []
        for base in ("bivlm", "rtn-w2g128"):
            whole = yaml.safe_load((ROOT / "bivlm" / "recipe" / "recipes" / f"{base}.yaml").read_text())
            try:
                parse_recipe(whole | part)
            except InputError as error:
                problems.append(str(error))
        assert len(problems) < 2, (text, problems)


def test_the_environment_variables_of_the_code_are_listed():
    read = {
        name
        for folder in ("bivlm", "tasks", "flows")
        for path in (ROOT / folder).rglob("*.py")
        for name in re.findall(r"\bBIVLM_[A-Z_]+\b", path.read_text())
    }
    read -= {"BIVLM_OWNER"}  # a command's, for the processes that it starts
    assert read - set(re.findall(r"\bBIVLM_[A-Z_]+\b", pages()["infra/README.md"])) == set()
    infra = "".join(path.read_text() for path in (ROOT / "infra").rglob("*") if path.suffix in {".py", ".sh", ".yaml"})
    named = {name for text in pages().values() for name in re.findall(r"\bBIVLM_[A-Z_]+\b", text)}
    assert {name for name in named - read if name not in infra} == set()


def test_the_deployments_are_those_of_prefect():
    made = {each["name"] for each in yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]}
    table = re.findall(r"^(`\S+/.*?) \|", prose("docs/deployments.md"), re.MULTILINE)
    assert {span.partition("/")[2] for cell in table for span in CODE.findall(cell)} == made


def test_the_architecture_page_shows_every_room():
    from test_floors import ROOMS

    named = re.findall(r"^`(\w+)/` \|", prose("docs/architecture.md").partition("## Rooms")[2], re.MULTILINE)
    assert tuple(named[::-1]) == ROOMS


def test_a_heading_has_the_anchor_that_github_gives_it():
    assert {"bivlm-trigger", "watched-models"} <= anchors("docs/deployments.md")


def test_a_command_in_several_lines_or_parts_is_read_whole(monkeypatch):
    text = "```sh\na b \\\n  c # d\n. e && f 'g h' &\n```\n"
    monkeypatch.setitem(pages(), "x", text)
    assert commands("x") == [["a", "b", "c"], [".", "e"], ["f", "g h"]]
