"""The output folder: which files in it are bivlm's, and how a new output takes the place of an earlier one.

A packed checkpoint lists its own files in ``.bivlm-files``, one per line; folders of tables do the same. The listing
comes with a checkpoint from elsewhere, so of its names only those that bivlm writes count. Nothing else is ever
removed: whatever else lies in the folder is moved into the new output. What would be read there as a part of the new
checkpoint, such as a tokenizer file of another model, is refused before any work.

A new output is made beside its place and renamed into it. Links are moved as links and never followed.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from filecmp import cmp
from pathlib import Path, PurePosixPath

from bivlm.checkpoint.reading import (
    CONFIG,
    GENERATE,
    LINEAGE,
    QUANT_METHOD,
    REPORT,
    TEMPLATES,
    WEIGHTS,
    WEIGHTS_INDEX,
    is_inside,
    is_licence_name,
    is_part_name,
    weights_of_index,
)
from bivlm.errors import InputError
from bivlm.untrusted import MODEL_CONFIG, read_object
from bivlm.workspace.stores.folder import flush_folder, writable_folder, write_atomically

LISTING = ".bivlm-files"
PAGE = "report.html"
SWEEP = "pruning"  # the folder of a recipe's sweep
RECORDS = {REPORT, LINEAGE, PAGE, LISTING}  # of every run, and in no listing
_SWEEP_FILE = re.compile(r"sweep\.csv|adaptive\.csv|baselines\.json|losses\.svg|accuracy\.svg|tables/[^/]+\.csv")
_CUT_OFF = re.compile(r"\.partial-[0-9a-f]{16}")  # see `bivlm.workspace.stores.folder.temporary_beside`
_LONGEST_STEM = 200  # bytes; a name has at most 255, and those beside an output are longer than its own


def check_replaceable(output: Path, base: Path | None = None) -> None:
    """Raise `InputError` unless a new output may take the place of the folder `output`.

    `base` is the folder of the checkpoint that will be packed: a file that it has with the same bytes is no loss.
    The folder where the new output waits for its evaluation has to be free in the same way.
    """
    if not output.name:
        raise InputError(f"output {output}: expected a folder with a name of its own")
    for place in (output, unfinished_of(output)):
        try:
            _check_replaceable(place, base)
        except OSError as error:
            raise InputError(f"output {place}: cannot be used: {error.strerror}") from error
        writable_folder(place.parent, f"folder of the output {place.name}:")


def _check_replaceable(output: Path, base: Path | None) -> None:
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        raise InputError(f"output {output}: exists and is not a folder")
    if os.path.ismount(output):
        raise InputError(f"output {output}: a disk is mounted there, which cannot be replaced; choose a folder in it")
    left = earlier_of(output)
    for place in (left, _beside(output, "partial"), _beside(output, "copy")):
        _refuse_strangers(place)
    if os.path.lexists(left) and os.path.lexists(output):
        _carry(left, output, _expendable(left, output), move=False)
    for present in (place for place in (left, output) if place.is_dir() and any(place.iterdir())):
        if present == output and not _has_our_config(output):
            raise InputError(f"output {output}: not empty, and not an earlier output; choose a new folder")
        if not os.access(present, os.W_OK | os.X_OK):
            raise InputError(f"output {output}: cannot be written to")
        _refuse_what_cannot_stay(present, base)


def _refuse_strangers(place: Path) -> None:
    """Raise `InputError` if something that bivlm did not make lies at `place`, which is beside an output."""
    if os.path.lexists(place) and not _is_ours(place):
        raise InputError(f"{place}: needed beside the output, and not made by bivlm; move it or choose another")


def _refuse_what_cannot_stay(folder: Path, other: Path | None) -> None:
    """Raise `InputError` naming what is not bivlm's in `folder` and is read with a checkpoint, or cannot be moved.

    A file that the folder `other` has with the same bytes is no loss.
    """
    own = _expendable(folder, other)
    foreign = list(_foreign(folder, own))
    if SWEEP in foreign and _is_folder(folder / SWEEP):  # the new output may have one, too
        foreign += _foreign(folder, own, f"{SWEEP}/")
    for place in (folder / name for name in (*foreign, *_folders_of(own))):
        if os.path.ismount(place) or (_is_folder(place) and not os.access(place, os.W_OK | os.X_OK)):
            raise InputError(
                f"output {folder}: {place} cannot be moved (a mounted disk, or not writable); move it elsewhere"
            )
    if names := [name for name in foreign if _is_read(name, folder)]:
        raise InputError(
            f"output {folder}: {some_of(names)}: not of the earlier output, and would be read as a part of the new "
            "one; move it elsewhere, or choose a new folder"
        )


def own_files(folder: Path) -> set[str]:
    """Return the names, with forward slashes, of the files in `folder` that bivlm wrote.

    A link in the place of one is the user's, and so is whatever lies behind a link.
    """
    listed = listing(folder)
    names = (_recorded(folder) if listed is None else listed) | RECORDS
    names |= {file.name for file in folder.iterdir() if _CUT_OFF.fullmatch(file.name)}
    return {name for name in names if is_written(name) and is_plain(folder, name)}


def extra_files(folder: Path) -> Iterator[Path]:
    """Return what a run leaves beside a checkpoint for people to see: the page, and the files of a sweep.

    Links in their places are returned, too, for `refuse_links_out_of`; none is followed.
    """
    page, sweep = folder / PAGE, folder / SWEEP
    if os.path.lexists(page):
        yield page
    if sweep.is_symlink():
        yield sweep
        return
    for place, folders, files in os.walk(sweep):
        for path in (Path(place) / name for name in sorted([*folders, *files])):
            if is_of_sweep(path.relative_to(folder).as_posix()) or path.is_symlink():
                yield path


def is_of_sweep(name: str, below: str = f"{SWEEP}/") -> bool:
    """Return whether `name` is that of a file of a sweep whose folder is `below`, empty or with a slash at its end."""
    return name.startswith(below) and _SWEEP_FILE.fullmatch(name.removeprefix(below)) is not None


def names_in(listing: bytes) -> set[str]:
    """Return the names in the bytes of a packed checkpoint's listing that are names of files which bivlm writes."""
    return {name for name in _lines(listing) if is_written(name)}


def is_written(name: str) -> bool:
    """Return whether bivlm writes files of this name into the folder of a packed checkpoint."""
    return is_part_name(name) or name in RECORDS or is_of_sweep(name) or _CUT_OFF.fullmatch(name) is not None


def listing(folder: Path) -> set[str] | None:
    """Return the names that `folder` lists as bivlm's, whatever they are; None if it has no listing."""
    return _lines((folder / LISTING).read_bytes()) if is_plain(folder, LISTING) else None


def _lines(listing: bytes) -> set[str]:
    return {name for name in listing.decode(errors="replace").split("\n") if is_inside(name)}


def list_files(folder: Path, names: Iterable[str], gone: Iterable[str] = ()) -> None:
    """Add `names` to those that `folder` lists as bivlm's, and take those that are `gone` away."""
    listed = listing(folder)
    before = listed if listed is not None else own_files(folder)
    lines = sorted({*before, *filter(is_inside, names)} - RECORDS - set(gone))
    write_atomically(folder / LISTING, lambda file: file.write("".join(f"{line}\n" for line in lines).encode()))


def some_of(names: list[str]) -> str:
    """Return the first of `names` and how many more there are, for a message."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


@contextmanager
def own_copy(folder: Path) -> Iterator[Path]:
    """Yield a folder with bivlm's files of `folder` alone; it lies beside it, and is made of hard links if possible."""
    place = _fresh(_beside(folder, "copy"))
    try:
        copy = place / "checkpoint"
        for name in sorted(own_files(folder)):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            try:
                (copy / name).hardlink_to(folder / name)
            except OSError:
                shutil.copyfile(folder / name, copy / name, follow_symlinks=False)
        yield copy
    finally:
        shutil.rmtree(place)


def fresh_partial(output: Path) -> Path:
    """Make the empty folder beside `output` in which the new one is built; what a killed run left there is removed."""
    return _fresh(_beside(output, "partial"))


def _fresh(partial: Path) -> Path:
    _refuse_strangers(partial)
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    (partial / LISTING).touch()
    return partial


def unfinished_of(output: Path) -> Path:
    """Return the folder beside `output` where a checkpoint waits until its run has evaluated and recorded it."""
    return _beside(output, "unfinished")


def lock_of(output: Path) -> Path:
    """Return the file beside `output` that a run holds locked: all who can write there see it."""
    return _beside(output, "bivlm-lock")


def earlier_of(output: Path) -> Path:
    """Return the name that an earlier output has for a moment, while it is replaced."""
    return _beside(output, "earlier")


def settle(output: Path) -> None:
    """Finish, or undo, a replacement in which a run was killed; do nothing if there was none."""
    left = earlier_of(output)
    if not os.path.lexists(left):
        return
    _refuse_strangers(left)
    with _refused_by_the_disk(output):
        if _is_hollow(left):  # killed twice at the last step
            shutil.rmtree(left)
        elif os.path.lexists(output):
            _empty(left, output)
        else:
            left.rename(output)


def replace(output: Path, new: Path) -> None:
    """Put the folder `new` in the place of `output`, and into it what is not bivlm's of the one that was there.

    Killed at any point, the next run finds either output whole, and whatever is not bivlm's in it or in the folder
    beside it, from where `settle` moves it. Raises `InputError`, with nothing changed, for a folder that is no output
    and was made there meanwhile, and for a file that was added and would be read as a part of the new output.
    """
    settle(output)
    left = earlier_of(output)
    with _refused_by_the_disk(output):
        if os.path.lexists(output):
            if not _is_ours(output):
                raise InputError(f"output {output}: made by something else meanwhile; move it, the new one is in {new}")
            _refuse_what_cannot_stay(output, new)
            _carry(output, new, _expendable(output, new), move=False)
            output.rename(left)
        try:
            new.rename(output)
        except BaseException:
            if os.path.lexists(left):
                left.rename(output)
            raise
        flush_folder(output.parent)
    settle(output)


@contextmanager
def _refused_by_the_disk(output: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(
            f"output {output}: {error.filename}: cannot be moved or removed ({error.strerror}); move it by hand"
        ) from error


def _empty(left: Path, output: Path) -> None:
    """Move what is not bivlm's from `left` into `output`, and then remove `left` with the files that are."""
    # Listed before the first of them goes: without it, after a kill, what remains would pass for the user's.
    list_files(left, own_files(left))
    own = _expendable(left, output)
    for name in (f"{SWEEP}/tables", SWEEP, TEMPLATES, GENERATE):  # emptied by a run that was killed here
        with suppress(OSError):
            (left / name).rmdir()
    _carry(left, output, own, move=True)
    for name in own - {LISTING}:
        (left / name).unlink()
    for name in reversed(_folders_of(own)):
        (left / name).rmdir()
    (left / LISTING).unlink()
    left.rmdir()


def _carry(left: Path, output: Path, own: set[str], move: bool) -> None:
    """Raise `InputError` naming what is not in `own` and has no room in `output`; with `move`, move all the rest."""
    if names := list(_without_room(left, output, own, move)):
        raise InputError(f"{left}: {some_of(names)}: kept, because {output} has the same; move it elsewhere")


def _without_room(left: Path, output: Path, own: set[str], move: bool, prefix: str = "") -> Iterator[str]:
    for name in list(_foreign(left, own, prefix)):
        source, target = left / name, output / name
        if os.path.lexists(target) and not (_is_folder(source) and _is_folder(target)):
            yield name
        elif os.path.lexists(target):
            kept = list(_without_room(left, output, own, move, f"{name}/"))
            if move and not kept:
                source.rmdir()
            yield from kept
        elif move:
            target.parent.mkdir(parents=True, exist_ok=True)
            source.rename(target)


def _folders_of(names: Iterable[str]) -> list[str]:
    """Return the folders that files of these names lie in, each before those in it."""
    return sorted({parent.as_posix() for name in names for parent in PurePosixPath(name).parents} - {"."})


def _foreign(folder: Path, own: set[str], prefix: str = "") -> Iterator[str]:
    """Return the names in `folder` that are not in `own`: a folder once, unless some of what lies in it is."""
    for entry in sorted(os.scandir(folder / prefix), key=lambda entry: entry.name):
        name = f"{prefix}{entry.name}"
        if name in own:
            continue
        if entry.is_dir(follow_symlinks=False) and any(each.startswith(f"{name}/") for each in own):
            yield from _foreign(folder, own, f"{name}/")
        else:
            yield name


def _is_read(name: str, folder: Path) -> bool:
    """Return whether something of this name in a packed checkpoint's folder is taken for a part of it."""
    first, *rest = PurePosixPath(name).parts
    if rest or _is_folder(folder / name):
        filled = bool(rest) or any((folder / name).iterdir())
        return (first in (TEMPLATES, GENERATE) and filled) or (not rest and name in RECORDS | {CONFIG, WEIGHTS_INDEX})
    return name in RECORDS | {TEMPLATES, GENERATE, SWEEP} or is_part_name(name)


def _expendable(folder: Path, other: Path | None) -> set[str]:
    """Return the files in `folder` that are bivlm's, or that `other` has with the same bytes, which are no loss."""
    own = own_files(folder)
    if other is None:
        return own
    alike = (name for name in _foreign(folder, own) if is_plain(folder, name) and (other / name).is_file())
    return own | {name for name in alike if cmp(folder / name, other / name, shallow=False)}


def _recorded(folder: Path) -> set[str]:
    """Return the names that an output without a listing records, as earlier versions wrote it."""
    if not _has_our_config(folder):
        return set()
    names = {CONFIG, WEIGHTS_INDEX}
    try:
        names |= {WEIGHTS} if (folder / WEIGHTS).exists() else set(weights_of_index(folder))
        names |= {name for name in read_object(folder / LINEAGE)["packed"]["files"] if is_inside(name)}
        # No record has the licences. Those of the base were copied before the record was written.
        written = (folder / LINEAGE).stat().st_mtime
        licences = (file for file in folder.iterdir() if is_licence_name(file.name))
        names |= {file.name for file in licences if file.lstat().st_mtime <= written}
    except (InputError, OSError, KeyError, TypeError):
        pass  # one that was cut off before its record; or no record
    return names | {file.relative_to(folder).as_posix() for file in extra_files(folder)}


def _is_ours(folder: Path) -> bool:
    """Return whether bivlm made a folder at or beside an output; of an empty one nothing would be lost."""
    return _is_folder(folder) and (_is_hollow(folder) or is_plain(folder, LISTING) or _has_our_config(folder))


def _is_hollow(folder: Path) -> bool:
    return all(_CUT_OFF.fullmatch(file.name) for file in folder.iterdir())


def _has_our_config(folder: Path) -> bool:
    if not is_plain(folder, CONFIG):
        return False
    try:
        quantization = read_object(folder / CONFIG, MODEL_CONFIG).get("quantization_config")
    except (InputError, OSError):
        return False
    return isinstance(quantization, dict) and quantization.get("quant_method") == QUANT_METHOD


def is_plain(folder: Path, name: str) -> bool:
    """Return whether `name` is a file in `folder`, neither a link nor behind one."""
    place = folder / name
    try:
        between = [parent for parent in place.parents if parent != folder and parent.is_relative_to(folder)]
        return stat.S_ISREG(place.lstat().st_mode) and not any(parent.is_symlink() for parent in between)
    except (OSError, ValueError):
        return False


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _beside(output: Path, kind: str) -> Path:
    stem = output.name
    if len(os.fsencode(stem)) > _LONGEST_STEM:
        stem = hashlib.sha256(os.fsencode(stem)).hexdigest()[:16]
    return output.with_name(f".{stem}.{kind}")
