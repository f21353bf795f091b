"""Calibration samples, frozen: pictures and conversations in a folder, with one hash over all of it.

Beside the samples to calibrate on, the folder holds the held-out ones that the divergence is measured on. The hash is
over what the samples are (texts, and the pixels of the pictures), not over how a version of an image library writes
them, and is checked on every read.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from bivlm.calibration.drawing import Draw, picture_digest
from bivlm.errors import InputError
from bivlm.recipe.calibration import CalibrationSettings
from bivlm.sources.image_folders import Line, read_lines
from bivlm.sources.images import as_rgb, clipped_rgb, open_picture
from bivlm.sources.samples import Conversation
from bivlm.workspace.hashing import digest, file_digest

FROZEN = "conversations.jsonl"
HELD_OUT = "held_out.jsonl"
RECORD = "drawn.json"


@dataclass(frozen=True)
class CalibrationSet:
    """A frozen folder: ``conversations.jsonl``, ``held_out.jsonl``, PNG pictures, and ``drawn.json`` on how it came.

    Attributes:
        folder: where it lies.
        samples: conversations to calibrate on.
        held_out: conversations that calibration never sees.
        text_only: how many of `samples` are without a picture.
        skipped: entries of the sources that were drawn, could not be used, and were replaced.
        revision: commit of the source, if that is a data set of the hub.
        text_revision: the same of the text source.
        sha256: hash over the content of both parts.
    """

    folder: Path
    samples: int
    held_out: int
    text_only: int
    skipped: int
    revision: str | None
    text_revision: str | None
    sha256: str


def freeze_samples(settings: CalibrationSettings, folder: str | Path) -> CalibrationSet:
    """Draw the samples that the settings ask for and write them to `folder`, which appears whole or not at all.

    One picture is held at a time. Entries of published data sets that cannot be used are replaced by the next drawn,
    and their number is warned of. Raises `InputError` as `Draw` does, and when `folder` holds something already;
    ConnectionError when the hub cannot be reached.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder}: expected a new or empty folder for the calibration samples")
    draw = Draw(settings)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        _write(draw.samples(), partial, FROZEN, "")
        _write(draw.held_out(), partial, HELD_OUT, "held-")
        revision, text_revision = draw.revisions
        record = {"skipped": draw.skipped, "revision": revision, "text_revision": text_revision}
        (partial / RECORD).write_text(json.dumps(record) + "\n", encoding="utf-8")
        partial.chmod(0o755)
        partial.replace(folder)
    except BaseException:
        shutil.rmtree(partial)
        raise
    for complaint in draw.complaints:
        warnings.warn(f"calibration: {complaint}", stacklevel=2)
    return open_calibration(folder)


def open_calibration(folder: str | Path) -> CalibrationSet:
    """The record of a folder that was frozen earlier; raises `InputError` when it is none."""
    folder = Path(folder)
    pictures = [line.values.get("image") for line in read_lines(folder, FROZEN)]
    held_out = sum(1 for _ in read_lines(folder, HELD_OUT))
    (record,) = read_lines(folder, RECORD)
    record.check_keys(("skipped", "revision", "text_revision"))
    return CalibrationSet(
        folder=folder,
        samples=len(pictures),
        held_out=held_out,
        text_only=pictures.count(None),
        sha256=digest({name: file_digest(folder / name) for name in (FROZEN, HELD_OUT)}),
        **record.values,
    )


def load_samples(folder: str | Path) -> list[Conversation]:
    """The samples to calibrate on, in order; raises `InputError` when a picture is not the one frozen."""
    return [_conversation(line) for line in read_lines(Path(folder), FROZEN)]


def load_held_out(folder: str | Path) -> list[Conversation]:
    """The samples that calibration never sees, in order; raises as `load_samples`."""
    return [_conversation(line) for line in read_lines(Path(folder), HELD_OUT)]


def _conversation(line: Line) -> Conversation:
    line.check_keys(("image", "image_sha256", "user", "assistant"))
    if line.values["image"] is None:
        return Conversation(None, line.text("user"), line.text("assistant"))
    # As it was written: of a file with a transparent palette, earlier versions froze RGB with a transparent colour.
    picture = open_picture(line.picture(), clipped_rgb)
    if picture_digest(picture) != line.text("image_sha256"):
        line.complain("image", line.text("image"), "the picture that was frozen, it has changed since")
    return Conversation(picture, line.text("user"), line.text("assistant"))


def _write(conversations: Iterable[Conversation], folder: Path, file_name: str, prefix: str) -> None:
    """Writes the texts to a file and the pictures beside it."""
    lines = []
    for index, conversation in enumerate(conversations):
        line = {"image": None, "image_sha256": None, "user": conversation.user, "assistant": conversation.assistant}
        if conversation.image is not None:
            picture = as_rgb(conversation.image)
            line |= {"image": f"{prefix}{index:05d}.png", "image_sha256": picture_digest(picture)}
            picture.save(folder / line["image"], format="PNG")
        lines.append(json.dumps(line, ensure_ascii=True) + "\n")
    (folder / file_name).write_bytes("".join(lines).encode())
