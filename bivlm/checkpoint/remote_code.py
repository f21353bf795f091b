"""Code that comes with a model: it never runs unless the user has named that model.

Every place that builds a config, model or processor from a folder asks `remote_code_allowed` and passes the answer to
transformers, which would otherwise ask on the terminal. The names are in an environment variable, so that the processes
a run starts, and workers elsewhere, decide as the command did.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import constants

from bivlm.checkpoint.reading import CONFIG, auto_maps, code_maps, read_config
from bivlm.errors import InputError
from bivlm.untrusted import short

VARIABLE = "BIVLM_TRUST_REMOTE_CODE"
OPTION = "--trust-remote-code"

_AUTO_MODEL = "AutoModelForImageTextToText"
_ATTENTION = {"attn_implementation", "_attn_implementation", "_attn_implementation_internal"}
_SNAPSHOTS, _REPOSITORY = "snapshots", "models--"


def trust(names: Sequence[str]) -> None:
    """Let the code of these models run, in this process and those it starts; folders are made absolute.

    Raises `InputError` for a name that is neither a folder nor of the form owner/name.
    """
    known = list(trusted())
    for name in names:
        if Path(name).is_dir():
            name = str(Path(name).resolve())
            if os.pathsep in name:
                raise InputError(f"{OPTION} {name!r}: found {os.pathsep!r}, which separates names; move the folder")
        elif name.count("/") != 1 or not all(name.split("/")) or name.startswith((".", "~")):
            raise InputError(f"{OPTION} {name!r}: no such folder, and not a hub id of the form owner/name")
        known.append(name)
    if known:
        os.environ[VARIABLE] = os.pathsep.join(dict.fromkeys(known))


def trusted() -> tuple[str, ...]:
    """Return the models whose code may run: hub ids and folders."""
    return tuple(name for name in os.environ.get(VARIABLE, "").split(os.pathsep) if name)


def remote_code_allowed(folder: str | Path) -> bool:
    """Return the value of ``trust_remote_code`` for the checkpoint in `folder`.

    Raises `InputError` that explains what to do if the checkpoint cannot be used without code of its own and was not
    named, or if it takes code from another repository, which no revision pins.
    """
    folder = Path(folder)
    named_elsewhere = (reference for _, reference in _references(folder) if "--" in reference or "/" in reference)
    foreign = sorted({_place(reference) for reference in named_elsewhere})
    named = _is_named(folder)
    if foreign and (named or code_needed(folder)):
        raise InputError(
            f"model {shown(folder)}: takes code from {', '.join(foreign)}, which its own revision does not pin; "
            "expected the files beside its config, named there without 'owner/name--'"
        )
    if named:
        return True
    reason = code_needed(folder)
    if reason is None:
        return False
    raise code_refused(folder, reason)


def code_refused(folder: str | Path, reason: str) -> InputError:
    """Return the error for a checkpoint that needs code of its own for `reason` and was not named, with what to do."""
    files = sorted({f"{reference.rpartition('.')[0]}.py" for _, reference in _references(Path(folder))})
    given = ", ".join(trusted()) or "none"
    return InputError(
        f"model {shown(folder)}: {reason}. Code that comes with a model can do whatever you can, and is off unless "
        f"the model is named (named now: {given}). Read it{_in_brackets(files)}; to let it run, say "
        f"{OPTION} {shown(folder)}, or set {VARIABLE}={shown(folder)} where the workers are"
    )


def code_needed(folder: str | Path) -> str | None:
    """Return why the checkpoint in `folder` cannot be used without running code that comes with it; None if it can.

    Code for an architecture that transformers has too is not needed: transformers' own class is taken.
    """
    from transformers import __version__
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as KNOWN

    config = read_config(Path(folder) / CONFIG)
    kernels = sorted(_kernels(config))
    if kernels:
        return f"its config asks for an attention kernel from the hub ({kernels[0]})"
    if any(_maps(part) for part in config.values()):
        return "a part of its config asks for code (auto_map)"
    model_type = config.get("model_type")
    if _maps(config) and model_type not in KNOWN:
        return (
            f"transformers {__version__} has no image-text model of model_type {short(model_type)}, and its config "
            "asks for code of its own (auto_map)"
        )
    return None


def unknown_architecture(folder: str | Path) -> str | None:
    """Return why neither transformers nor the checkpoint's code makes an image-text model of it; None if one does."""
    from transformers import __version__
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as KNOWN

    config = read_config(Path(folder) / CONFIG)
    model_type = config.get("model_type")
    if model_type in KNOWN or any(name == _AUTO_MODEL for name, _ in _references(Path(folder))):
        return None
    brings = " and the code it brings makes none" if _maps(config) else ""
    return f"transformers {__version__} has no image-text model of model_type {short(model_type)}{brings}"


def shown(folder: str | Path) -> str:
    """Return the hub id if `folder` is a snapshot in the hub's cache, else the folder."""
    return _hub_id(Path(folder)) or str(folder)


def _is_named(folder: Path) -> bool:
    hub_id, place = _hub_id(folder), folder.resolve()
    return any(
        Path(name).resolve() == place if Path(name).is_dir() else hub_id is not None and name == hub_id
        for name in trusted()
    )


def _hub_id(folder: Path) -> str | None:
    """Return owner/name of a snapshot in the hub's cache; any other folder of that form is only a folder."""
    place = folder.absolute()
    repository = place.parent.parent
    in_cache = repository.parent.resolve() == Path(constants.HF_HUB_CACHE).expanduser().resolve()
    if place.parent.name != _SNAPSHOTS or not repository.name.startswith(_REPOSITORY) or not in_cache:
        return None
    return repository.name.removeprefix(_REPOSITORY).replace("--", "/")


def _references(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield (auto class, ``file.Class``) of every class of its own that a config in `folder` names."""
    for auto_map in code_maps(folder):
        # Of a tokenizer it may be a list by itself.
        for auto_class, reference in auto_map.items() if isinstance(auto_map, dict) else [("", auto_map)]:
            yield from ((auto_class, each) for each in _texts(reference))


def _texts(value: Any) -> Iterator[str]:
    """Yield a class, or several: a tokenizer's slow and fast one in a list, an image processor's by backend."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _texts(part)


def _maps(value: Any) -> bool:
    return next(auto_maps(value), None) is not None


def _kernels(value: Any, key: str = "") -> Iterator[str]:
    if isinstance(value, dict):
        for name, part in value.items():
            yield from _kernels(part, name if name in _ATTENTION else key)
    elif isinstance(value, list):
        for part in value:
            yield from _kernels(part, key)
    elif key in _ATTENTION and isinstance(value, str) and "/" in value:
        yield value


def _place(reference: str) -> str:
    """Return the repository that a reference names, or the file in another folder."""
    repository, separator, _ = reference.partition("--")
    return repository if separator else f"{reference.rpartition('.')[0]}.py"


def _in_brackets(files: Sequence[str]) -> str:
    return f" ({', '.join(files)})" if files else ""
