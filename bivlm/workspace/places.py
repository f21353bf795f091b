"""The folders of a run, and whether any of them lies where another would destroy it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path

from bivlm.errors import InputError
from bivlm.workspace.stores.location import cache_folder, default_workspace


@dataclass(frozen=True)
class Place:
    """A folder or file that a run uses.

    Attributes:
        role: what messages call it.
        path: where it is; it need not exist yet.
        replaced: what lies in it is moved away or removed.
        written: it gets new files.
        closed: nothing of another place may be written into it.
    """

    role: str
    path: Path
    replaced: bool = False
    written: bool = False
    closed: bool = False


def output_folder(text: str | Path) -> Path:
    """Return the absolute path of the folder that a user named for an output; raise `InputError` if it can be none."""
    try:
        if not str(text).strip() or "://" in str(text):
            raise ValueError("no path")
        path = Path(text).expanduser().absolute()
        path = path.resolve() if ".." in path.parts else path
        str(path).encode()  # Prefect, MLflow and the records write it as UTF-8
        with suppress(FileNotFoundError, NotADirectoryError):
            path.lstat()
    except (OSError, RuntimeError, ValueError) as error:  # no such user, a loop of links, a NUL
        raise InputError(f"output {str(text)!r}: expected a folder on this machine ({error})") from None
    return path


def refuse_overlaps(places: Sequence[Place]) -> None:
    """Raise `InputError` naming two of `places`, links resolved, of which one would destroy or change the other."""
    for outer, inner in permutations(places, 2):
        if (outer.replaced or (outer.closed and inner.written)) and _lies_in(inner, outer):
            if outer.replaced:
                mover, other, why = outer, inner, "which would be moved with it"
            else:
                mover, other, why = inner, outer, "where nothing else may lie"
            raise InputError(
                f"{mover.role} {mover.path}: overlaps the {other.role} ({other.path}), {why}; choose another folder "
                f"for the {mover.role}"
            )


def check_places(
    places: Iterable[Place], models: Iterable[str], workspace: str | None, data: Iterable[str] = ()
) -> None:
    """Raise `InputError` as `refuse_overlaps` for what a run writes, `places`, and everything else that it uses.

    `models` and `data` are folders, ids of the hub or addresses in S3; `workspace` is None for the default one.
    """
    used = [base_place(model) for model in models if _is_there(model)]
    used += [_workspace_place(workspace or default_workspace()), *_surroundings()]
    used += [Place("data", Path(name)) for name in data if _is_there(name)]
    refuse_overlaps([*places, *used])


def output_place(folder: Path) -> Place:
    """Return the place of a packed checkpoint that is to be written."""
    return Place("output", folder, replaced=True, written=True)


def base_place(folder: str | Path) -> Place:
    """Return the place of a full-precision checkpoint."""
    return Place("base model", Path(folder), closed=True)


def _workspace_place(location: str) -> Place:
    # Of one in S3 the copies on this machine.
    folder = cache_folder() / "s3" if location.startswith("s3://") else Path(location).expanduser()
    return Place("workspace", folder, written=True, closed=True)


def _surroundings() -> Iterator[Place]:
    yield Place("current folder", Path.cwd())
    yield Place("folder for temporary files", Path(tempfile.gettempdir()))
    yield Place("cache folder", cache_folder())
    yield Place("cache of the Hugging Face hub", Path(os.environ.get("HF_HOME") or "~/.cache/huggingface").expanduser())
    yield Place("folder of Prefect", Path(os.environ.get("PREFECT_HOME") or "~/.prefect").expanduser())
    scheme, _, database = os.environ.get("MLFLOW_TRACKING_URI", "").partition(":///")
    if scheme.startswith("sqlite") and database:
        yield Place("database of MLflow", Path(database.partition("?")[0]))


def _lies_in(inner: Place, outer: Place) -> bool:
    """Return whether `inner` is `outer` or somewhere below it, by whatever names the two go."""
    above, place = _resolved(outer), _resolved(inner)
    return any(each == above or _is_same(each, above) for each in (place, *place.parents))


def _resolved(place: Place) -> Path:
    try:
        return place.path.expanduser().resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a NUL
        raise InputError(f"{place.role} {str(place.path)!r}: not a path that leads anywhere ({error})") from None


def _is_same(one: Path, other: Path) -> bool:
    # The disk knows of names that differ in case alone, and of folders that are mounted twice.
    try:
        return one.samefile(other)
    except OSError:
        return False


def _is_there(name: str) -> bool:
    try:
        return bool(name) and Path(name).exists()
    except (OSError, ValueError):
        return False
