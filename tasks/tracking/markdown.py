"""Markdown for MLflow's pages, drawn from the templates beside this file."""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from tasks.tracking.tags import NOT_RECORDED

LONGEST = 4900  # of the 5,000 characters of the registry's column
_MEANS_SOMETHING = re.compile(r"([\\`*_{}\[\]()#+!|<>~])")


def as_text(value: object) -> Markup:
    """Return text from outside for Markdown: no link, no image, no HTML, no table cell of its own."""
    if isinstance(value, Markup):
        return value
    return Markup(NOT_RECORDED if value is None else _MEANS_SOMETHING.sub(r"\\\1", " ".join(str(value).split())))


def as_code(value: str | None) -> Markup:
    """Return a code span."""
    return as_text(None) if value is None else Markup(f"`{' '.join(value.split()).translate(_IN_CODE)}`")


def as_minute(when: str) -> str:
    """Return an ISO 8601 time to the minute."""
    return when[:16].replace("T", " ")


def render(template: str, **values: Any) -> str:
    """Return the page `NAME.md.jinja`, where every value is escaped unless it is Markdown already."""
    text = _environment.get_template(f"{template}.md.jinja").render(values).strip()
    return text.replace(" |", "\u00a0\u00a0 |")  # MLflow's tables have no space between columns


def cut(text: str) -> str:
    """Return as many lines of a page as the registry's column holds."""
    lines = text.split("\n")
    while len(text) > LONGEST:
        lines.pop()
        text = "\n".join([*lines, "", "and more: see the tags, and `bivlm audit`"])
    return text


_IN_CODE = str.maketrans({"`": "", "|": "/"})
# `autoescape` alone would escape HTML; what `finalize` returns is marked, and left as it is.
_environment = Environment(
    loader=PackageLoader("tasks.tracking"),
    autoescape=True,
    finalize=as_text,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=StrictUndefined,
)
# A version that somebody else registered has no run and no logged model: links say None.
_environment.filters |= {"code": as_code, "minute": as_minute, "url": lambda text: Markup(quote(str(text)))}
