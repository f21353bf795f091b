"""The house: floors and rooms import only what stands below them, and nothing imports in a circle."""

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FORBIDDEN = {
    "bivlm": {"tasks", "flows", "infra", "prefect", "mlflow"},
    "tasks": {"flows", "infra"},
    "flows": {"infra", "torch", "numpy", "safetensors"},  # the order of things knows no tensors
    "infra": {"bivlm", "tasks", "flows"},  # beside the house: what it runs on, and no part of a wheel
}
# The rooms of bivlm from the ground up: each imports only from rooms before it. The root is its own ground.
ROOMS = (
    "workspace",
    "kernels",
    "numerics",
    "packing",
    "checkpoint",
    "exports",
    "methods",
    "recipe",
    "sources",
    "reference",
    "calibration",
    "evaluation",
    "pruning",
    "compression",
    "reports",
)
ROOT_MODULES = ("addresses", "errors", "names", "untrusted")
# Names without contents, by which what was registered or pushed before the rooms imports something in them.
EARLIER_NAMES = ("pictures", "samples", "transformers_plugin")


def imported_names(source: str) -> set[str]:
    """The dotted names that a module imports, at its top, inside functions or for type checking alone.

    ``from a import b`` gives ``a.b``, which may be a module or a name in one.
    """
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the floor"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_module" and node.args:
            first = node.args[0]
            if isinstance(first, ast.Constant):
                found.add(first.value)
    return found


@cache
def modules() -> dict[str, Path]:
    """Every module of the floors by its dotted name; a package by its own."""
    found = {}
    for floor in FORBIDDEN:
        for path in sorted((ROOT / floor).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def imports() -> dict[str, frozenset[str]]:
    """The modules that each module imports."""
    return {
        name: frozenset(known(imported_names(path.read_text(encoding="utf-8"))) - {name})
        for name, path in modules().items()
    }


def known(names: set[str]) -> set[str]:
    """The modules that these dotted names lie in, as far as they are ours."""
    return {name if name in modules() else name.rpartition(".")[0] for name in names} & modules().keys()


def circle(graph: dict[str, frozenset[str]]) -> list[str]:
    """A circle of a graph, its first name again at the end; empty if there is none."""
    done: set[str] = set()

    def walk(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name not in done:
            for other in sorted(graph.get(name, ())):
                if found := walk(other, [*path, name]):
                    return found
            done.add(name)
        return []

    return next((found for name in graph if (found := walk(name, []))), [])


def room(module: str) -> str:
    """The room of a module of bivlm; "" for the root."""
    name = module.split(".")[1] if "." in module else ""
    return name if name in ROOMS else ""


@pytest.mark.parametrize("floor", FORBIDDEN)
def test_a_floor_knows_nothing_of_what_stands_above_it(floor):
    files = sorted((ROOT / floor).rglob("*.py"))
    assert files
    wrong = {
        f"{path.relative_to(ROOT)} imports {name}"
        for path in files
        for name in imported_names(path.read_text(encoding="utf-8"))
        if name.partition(".")[0] in FORBIDDEN[floor]
    }
    assert wrong == set()


def test_no_module_imports_in_a_circle():
    """Lazy imports and those for type checking count: they would only hide one."""
    assert circle(imports()) == []


def test_every_module_of_bivlm_stands_in_a_room():
    loose = {name for name in modules() if name.startswith("bivlm.") and not room(name)}
    assert loose == {f"bivlm.{name}" for name in (*ROOT_MODULES, *EARLIER_NAMES)}
    folders = {path.parent.relative_to(ROOT / "bivlm") for path in (ROOT / "bivlm").rglob("*.py")}
    assert len(folders - {Path()}) <= 21


def test_a_room_imports_only_from_rooms_below_it():
    wrong = {
        f"{module} imports {other}"
        for module, others in imports().items()
        if module.startswith("bivlm.") and module.removeprefix("bivlm.") not in EARLIER_NAMES
        for other in others
        if other.startswith("bivlm.")
        and room(other)
        and (not room(module) or ROOMS.index(room(other)) > ROOMS.index(room(module)))
    }
    assert wrong == set()


def test_an_earlier_name_is_only_a_name():
    for name in EARLIER_NAMES:
        path = ROOT / "bivlm" / f"{name}.py"
        _docstring, imported, exported = ast.parse(path.read_text(encoding="utf-8")).body
        assert isinstance(imported, ast.ImportFrom) and ast.unparse(exported).startswith("__all__ = "), path
        assert not {other for other, names in imports().items() if f"bivlm.{name}" in names}, path


@pytest.mark.parametrize(
    "source",
    [
        "import prefect",
        "from prefect.tasks import task",
        "def f():\n    import prefect.flows",
        "import os, prefect as p",
        "from importlib import import_module\nimport importlib\nimportlib.import_module('prefect')",
    ],
)
def test_every_way_to_import_is_seen(source):
    assert "prefect" in {name.partition(".")[0] for name in imported_names(source)}


def test_a_circle_is_seen():
    assert circle({"a": frozenset("b"), "b": frozenset("c"), "c": frozenset("b")}) == ["b", "c", "b"]
    assert circle({"a": frozenset("bc"), "b": frozenset("c"), "c": frozenset()}) == []


def test_files_stay_small_enough_to_read():
    long = {
        str(path.relative_to(ROOT)): lines
        for path in modules().values()
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > 450
    }
    assert long == {}
