"""Fit tables to any width: as a table where every word of it fits, else row by row, so that no figure is cut."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable
from textwrap import wrap

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

_LEAST = 20  # columns; a narrower terminal breaks the lines itself
_UNLIMITED = 1_000_000  # columns


def show(table: Table, *, piped: int = 0) -> None:
    """Print `table` as wide as the terminal, stacked where a word of it would be cut or broken.

    Where the output goes to no terminal it is at least `piped` columns wide.
    """
    console = Console()
    if not console.is_terminal:
        console = Console(width=max(console.width, piped))
    if _is_whole(table, console):
        console.print(table)
    else:
        for line in stacked(table, max(console.width, _LEAST)):
            console.print(line, markup=False, highlight=False, soft_wrap=True)


def stacked(table: Table, width: int) -> Iterable[str]:
    """Yield the lines of `table`, each cell after its column's heading, broken between words at `width` characters.

    A longer word, such as a hash, is a line of its own and stays whole.
    """
    if table.title:
        yield from _broken(_plain(table.title), width, "")
    headings = [_joined(_plain(column.header)) if table.show_header else "" for column in table.columns]
    rows = zip(*(column.cells for column in table.columns), strict=True)
    for number, row in enumerate(rows):
        yield from _row(headings, [_plain(cell) for cell in row], width, apart=number > 0)
    if table.show_footer:
        yield from _row(headings, [_plain(column.footer) for column in table.columns], width, apart=True)


def _row(headings: list[str], cells: list[str], width: int, *, apart: bool) -> Iterable[str]:
    if apart:
        yield ""
    for place, (heading, cell) in enumerate(zip(headings, cells, strict=True)):
        if cell.strip():
            text = f"{heading}: {cell.lstrip()}" if heading else cell
            yield from _broken(text.replace("-\n", "-"), width, "  " if place else "")


def _broken(text: str, width: int, indent: str) -> Iterable[str]:
    for number, line in enumerate(text.splitlines()):
        begin = indent if number == 0 else f"{indent}  "
        yield from wrap(
            line,
            width,
            initial_indent=begin,
            subsequent_indent=f"{indent}  ",
            break_long_words=False,
            break_on_hyphens=False,
        )


def _is_whole(table: Table, console: Console) -> bool:
    """Return whether each word of `table` stays whole when it is printed as wide as `console`.

    A word without a digit may be folded in a column that says so.
    """
    if Console(width=_UNLIMITED).measure(table).maximum <= console.width:
        return True
    page = Console(file=io.StringIO(), width=console.width, color_system=None)
    page.print(table)
    return Counter(_words(table)) <= Counter(page.file.getvalue().split())


def _words(table: Table) -> Iterable[str]:
    if table.title:
        yield from _plain(table.title).split()
    for column in table.columns:
        cells = [*column.cells, *([column.header] if table.show_header else [])]
        cells += [column.footer] if table.show_footer else []
        for word in " ".join(map(_plain, cells)).split():
            if column.overflow != "fold" or any(map(str.isdigit, word)):
                yield word


def _plain(cell: RenderableType) -> str:
    return cell.plain if isinstance(cell, Text) else Text.from_markup(str(cell)).plain


def _joined(heading: str) -> str:
    """Return a heading that was broken to make its column narrow, in one line."""
    return heading.replace("-\n", "").replace("\n", " ")
