"""The size of the repository: lines by floor and room, long functions, dicts of unknown keys, words of documentation.

    python -m benchmarks.lines

Lines are all lines of Python files, those of tests by the folder of `tests` that has the room's name. A function is
long from `LONG` lines on, docstring included. A `dict[str, Any]` in a signature does not say which keys it has.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
FLOORS = ("bivlm", "tasks", "flows", "infra", "benchmarks")
DOCUMENTATION = ("README.md", "docs/*.md", "infra/README.md", "CONTRIBUTING.md")
LONG = 61
UNTOLD = re.compile(r"\bdict\[str, Any\]")

Function = ast.FunctionDef | ast.AsyncFunctionDef


def product_lines(root: Path) -> Counter[str]:
    """Return the lines of each floor, and of each room of `bivlm` as "bivlm/ROOM"."""
    return _lines(root, (path for floor in FLOORS for path in (root / floor).rglob("*.py")))


def test_lines(root: Path) -> Counter[str]:
    """Return the lines of each folder of `tests`, "" for the files in none."""
    return _lines(root / "tests", (root / "tests").rglob("*.py"))


def functions(root: Path) -> Iterator[tuple[str, Function]]:
    """Yield every function of the floors with its place, "FILE:LINE NAME"."""
    for path in sorted(path for floor in FLOORS for path in (root / floor).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, Function):
                yield f"{path.relative_to(root)}:{node.lineno} {node.name}", node


def length(function: Function) -> int:
    """Return the lines of a function from its `def` on."""
    return (function.end_lineno or function.lineno) - function.lineno + 1


def untold(function: Function) -> int:
    """Return how often a signature says `dict[str, Any]`."""
    every = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    every += [argument for argument in (function.args.vararg, function.args.kwarg) if argument]
    annotations = [*(argument.annotation for argument in every), function.returns]
    return sum(len(UNTOLD.findall(ast.unparse(each))) for each in annotations if each)


def words_by_page(root: Path) -> dict[str, int]:
    """Return the words of each page of the documentation."""
    return {
        str(path.relative_to(root)): len(path.read_text(encoding="utf-8").split())
        for pattern in DOCUMENTATION
        for path in sorted(root.glob(pattern))
    }


def main() -> None:
    """Print one row a room, then what is long."""
    product, tests = product_lines(ROOT), test_lines(ROOT)
    print(f"{'':<20}{'product':>8}{'tests':>8}")
    for room, count in product.items():
        print(f"{room:<20}{count:>8}{tests.pop(room.removeprefix('bivlm/'), 0) or '':>8}")
    for folder, count in tests.items():
        print(f"{f'tests/{folder}':<20}{'':>8}{count:>8}")
    print(f"{'all':<20}{product.total():>8}{test_lines(ROOT).total():>8}\n")
    every = dict(functions(ROOT))
    long = {place: length(function) for place, function in every.items() if length(function) >= LONG}
    print(f"{len(long)} of {len(every)} functions have {LONG} lines or more")
    for place, count in sorted(long.items(), key=lambda item: -item[1]):
        print(f"  {count} {place}")
    print(f"{sum(map(untold, every.values()))} dict[str, Any] in signatures")
    print(f"{sum(words_by_page(ROOT).values())} words of documentation")


def _lines(root: Path, paths: Iterator[Path]) -> Counter[str]:
    """Count lines by the first folder under `root`, and of `bivlm` by the second."""
    found: Counter[str] = Counter()
    for path in sorted(paths):
        folders = path.relative_to(root).parts[:-1]
        room = "/".join(folders[: 2 if folders[:1] == ("bivlm",) else 1])
        found[room] += len(path.read_text(encoding="utf-8").splitlines())
    return found


if __name__ == "__main__":
    main()
