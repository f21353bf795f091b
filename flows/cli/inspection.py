"""`bivlm inspect`: what a checkpoint is made of, as a table with shares of parameters."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from bivlm.errors import InputError

if TYPE_CHECKING:
    from bivlm.checkpoint.architectures import Modules


def modules_from(recipe: str | None, file: Path | None) -> Modules | None:
    """The modules that a recipe names, or a YAML file of vision, adaptor and language; None without either.

    Raises `InputError` for a recipe or file that is not valid, and for a recipe that names none.
    """
    from bivlm.checkpoint.architectures import MODULES_KEY, parse_modules
    from bivlm.recipe.loading import load_recipe
    from bivlm.untrusted import read_yaml

    if recipe is not None:
        return load_recipe(recipe).modules
    if file is None:
        return None
    if not file.exists():
        raise InputError(f"{file}: no such file; expected names of modules by vision, adaptor and language")
    data = read_yaml(file)
    if isinstance(data, dict) and list(data) == [MODULES_KEY]:  # as it stands in a recipe
        data = data[MODULES_KEY]
    return parse_modules(data, str(file))


def print_inspection(found: dict[str, Any]) -> None:
    """The result of `bivlm.reports.inspection.inspect`: what adds up to the whole, then every linear, then what is
    left."""
    from rich import box
    from rich.markup import escape
    from rich.table import Column, Table

    from flows.cli.console import print_table, print_whole, shape_text

    quantization = found["quantization"]
    title = f"{found['model_type']}{f', packed by {quantization}' if quantization else ''}"
    parts = Table(
        "component", Column("kind", overflow="fold"), title=title, box=box.SIMPLE, show_footer=True, pad_edge=False
    )
    parts.columns[0].footer = "all"
    for heading, footer in (
        ("tensors", sum(part["tensors"] for part in found["parts"])),
        ("parameters", f"{found['parameters']:,}"),
        ("share", percent(sum(part["share"] for part in found["parts"]))),
    ):
        parts.add_column(heading, str(footer), justify="right", no_wrap=True)
    parts.add_column("", no_wrap=True)
    before = None
    for part in found["parts"]:
        component = part["component"]
        if before not in (None, component):
            parts.add_section()
        cells = (f"{part['tensors']:,}", f"{part['parameters']:,}", percent(part["share"]), part["state"])
        parts.add_row("" if component == before else component, escape(part["kind"]), *cells)
        before = component
    print_table(parts)

    linears = Table("linear", "component", "shape", "dtype", "mean", "std", "kurtosis", "KL to Gaussian", box=None)
    for linear in found["linears"]:
        figures = [_figure(linear[key]) for key in ("mean", "std", "kurtosis", "kl_gaussian")]
        dtype = f"{linear['dtype']}, packed" if linear["packed"] else linear["dtype"]
        linears.add_row(escape(linear["name"]), linear["component"], shape_text(linear["shape"]), dtype, *figures)
    print_whole(linears)

    tensors = Table("left alone", "what it is", "shape", "dtype", "share", box=None)
    for tensor in found["left_alone"]["tensors"]:
        cells = (shape_text(tensor["shape"]), tensor["dtype"], percent(tensor["share"]))
        tensors.add_row(escape(tensor["name"]), escape(tensor["kind"]), *cells)
    print()
    print_whole(tensors)


def percent(share: float) -> str:
    """Two places; what is there is never shown as nothing."""
    return "< 0.01 %" if 0 < share < 0.00005 else f"{100 * share:.2f} %"


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
