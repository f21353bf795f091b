"""Weights that are pickles: recognised by their names, refused, and how to convert them."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath

from bivlm.errors import InputError

_SUFFIXES = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}
_NO_WEIGHTS = {"training_args.bin", "optimizer.pt", "scheduler.pt", "scaler.pt"}  # what a trainer leaves
_READ_BY_TRANSFORMERS = "pytorch_model"
_COMMAND = (
    "import sys; from transformers import AutoModelForImageTextToText as M, AutoProcessor as P; "
    "given = dict(revision=sys.argv[3]) if len(sys.argv) > 3 else {}; "
    "M.from_pretrained(sys.argv[1], dtype='auto', use_safetensors=False, **given).save_pretrained(sys.argv[2]); "
    "P.from_pretrained(sys.argv[1], **given).save_pretrained(sys.argv[2])"
)


def pickle_names(names: Iterable[str]) -> list[str]:
    """Return the files at the top of a checkpoint that hold weights as pickles, by name."""
    return sorted(
        name
        for name in names
        if "/" not in name and PurePosixPath(name).suffix in _SUFFIXES and name not in _NO_WEIGHTS
    )


def conversion_command(model: str, revision: str | None = None) -> str:
    """Return a command line that writes `model`, a folder or hub id, with safetensors into the folder CONVERTED.

    transformers reads pickles of tensors and nothing else (``weights_only``), but holds the whole model in memory.
    """
    arguments = [model, "CONVERTED", *([revision] if revision else [])]
    return f'python -c "{_COMMAND}" {shlex.join(arguments)}'


def pickles_refused(subject: str, model: str, names: Sequence[str], revision: str | None = None) -> InputError:
    """Return the error for `subject`, whose weights are the pickles `names`; transformers knows it as `model`."""
    said = (
        f"{subject}: its weights are pickles ({names[0]}), which can run code when they are read; expected safetensors"
    )
    if not any(name.startswith(_READ_BY_TRANSFORMERS) for name in names):
        return InputError(f"{said}. transformers reads no such file either: look for a copy of the model that has them")
    return InputError(
        f"{said}. Convert it once, and give CONVERTED as the model:\n  {conversion_command(model, revision)}"
    )
