"""`bivlm evaluate`, `inspect` and `bits`: show accuracy, parts and bits of a checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.cli.commands import DONE, import_late, print_json
from flows.cli.quiet import hide_loading_bars

if TYPE_CHECKING:
    from bivlm.checkpoint.architectures import Modules


def add(commands: Any) -> list[argparse.ArgumentParser]:
    """Add the parsers to the `commands` of another, and return them."""
    evaluate = commands.add_parser("evaluate", help="accuracy of a checkpoint, packed or not, on one task")
    evaluate.add_argument("--model", required=True, metavar="DIR_OR_HUB_ID")
    evaluate.add_argument("--revision", metavar="R", help="branch, tag or commit on the hub")
    evaluate.add_argument(
        "--task",
        required=True,
        metavar="TASK",
        help="reference:SET, vqa:FOLDER, or mme:, mmmu:, scienceqa:, vizwiz:hub",
    )
    evaluate.add_argument("--against", metavar="DIR", type=Path, help="full precision: what is lost against it")
    evaluate.add_argument("--limit", type=int, metavar="N", help="only the first N questions")
    evaluate.add_argument("--batch-size", type=int, metavar="N", help="questions that are answered together")
    evaluate.add_argument("--pruned", action="store_true", help="drop tokens as the checkpoint says it may")
    evaluate.add_argument("--json", action="store_true", help="print one JSON object")
    evaluate.set_defaults(run=_evaluate)

    inspect = commands.add_parser("inspect", help="components, linear layers and weight statistics of a checkpoint")
    inspect.add_argument("--model", required=True, metavar="DIR_OR_HUB_ID")
    inspect.add_argument("--revision", metavar="R", help="branch, tag or commit on the hub")
    said = inspect.add_mutually_exclusive_group()
    said.add_argument("--recipe", metavar="NAME_OR_FILE", help="whose 'modules' name the model's parts")
    said.add_argument(
        "--modules", metavar="FILE", type=Path, help="YAML: names of modules by vision, adaptor, language"
    )
    inspect.add_argument("--json", action="store_true", help="print one JSON object")
    inspect.set_defaults(run=_inspect)

    bits = commands.add_parser("bits", help="bits per weight of a checkpoint: nominal, entropy and stored")
    bits.add_argument("folder", metavar="DIR", type=Path)
    bits.add_argument("--json", action="store_true", help="print one JSON object")
    bits.set_defaults(run=_bits)
    return [evaluate, inspect, bits]


def _evaluate(options: argparse.Namespace) -> int:
    from bivlm.sources.models import resolve_model
    from flows.cli.evaluate import evaluate_folders

    hide_loading_bars()
    given = {key: getattr(options, key) for key in ("limit", "against", "pruned", "batch_size")}
    record = evaluate_folders(resolve_model(options.model, options.revision).folder, options.task, **given)
    record["model"] = options.model
    if options.json:
        print_json(record)
    else:
        from flows.cli.console import print_evaluation

        print_evaluation(record)
    return DONE


def _inspect(options: argparse.Namespace) -> int:
    import_late("torch")  # what it counts and measures needs it, a model that is not there does not
    from bivlm.sources.models import resolve_model

    folder = resolve_model(options.model, options.revision).folder
    from bivlm.reports.inspection import inspect

    found = inspect(folder, modules=modules_from(options.recipe, options.modules))
    if options.json:
        print_json(found)
    else:
        from flows.cli.console import print_inspection

        print_inspection(found)
    return DONE


def _bits(options: argparse.Namespace) -> int:
    import_late("torch")
    from bivlm.reports.bits import bits_of

    bits = bits_of(options.folder)
    if options.json:
        print_json(bits)
    else:
        from flows.cli.console import print_bits

        print_bits(bits)
    return DONE


def modules_from(recipe: str | None, file: Path | None) -> Modules | None:
    """Return the modules that a recipe or a YAML file names by vision, adaptor and language; None if there is none.

    Raises `InputError` for a recipe or file that is not valid.
    """
    from bivlm.checkpoint.architectures import MODULES_KEY, parse_modules
    from bivlm.errors import InputError
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
