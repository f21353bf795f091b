"""Each floor imports only what stands below it: flows -> tasks -> bivlm."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FORBIDDEN = {
    "bivlm": {"tasks", "flows", "prefect", "mlflow"},
    "tasks": {"flows"},
    "flows": {"torch", "numpy", "safetensors"},  # the order of things knows no tensors
}


def imported_packages(source: str) -> set[str]:
    """The top-level packages that a module imports, at its top or inside functions."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the floor"
            found.add(node.module.partition(".")[0])
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_module" and node.args:
            first = node.args[0]
            if isinstance(first, ast.Constant):
                found.add(first.value.partition(".")[0])
    return found


@pytest.mark.parametrize("floor", FORBIDDEN)
def test_a_floor_knows_nothing_of_what_stands_above_it(floor):
    files = sorted((ROOT / floor).rglob("*.py"))
    assert files
    wrong = {
        f"{path.relative_to(ROOT)} imports {package}"
        for path in files
        for package in imported_packages(path.read_text(encoding="utf-8")) & FORBIDDEN[floor]
    }
    assert wrong == set()


@pytest.mark.parametrize(
    "source",
    [
        "import prefect",
        "from prefect.tasks import task",
        "def f():\n    import prefect.flows",
        "import os, prefect as p",
    ],
)
def test_every_way_to_import_is_seen(source):
    assert "prefect" in imported_packages(source)


def test_rooms_stay_small_enough_to_read():
    long = {
        str(path.relative_to(ROOT)): lines
        for floor in FORBIDDEN
        for path in (ROOT / floor).rglob("*.py")
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > 450
    }
    assert long == {}
