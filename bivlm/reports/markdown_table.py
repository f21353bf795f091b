"""A table in Markdown."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence


def markdown_table(headings: Sequence[str], rows: Iterable[Sequence[str]], left: Collection[str]) -> list[str]:
    """Return the lines of a table. Columns are aligned to the right, but for those whose heading is in `left`."""
    rules = [":---" if heading in left else "---:" for heading in headings]
    return ["| " + " | ".join(map(_cell, line)) + " |" for line in (headings, rules, *rows)]


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
