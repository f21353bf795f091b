"""Calibration samples, frozen: pictures and conversations in a folder, with one hash over all of it.

The hash is over what the samples are (texts, and the pixels of the pictures), not over how a version of an image
library writes them, and is checked on every read.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from bivlm.errors import InputError
from bivlm.identity import file_digest
from bivlm.image_folders import FILE_NAME, Line, open_picture, read_lines
from bivlm.recipe import CalibrationSettings
from bivlm.samples import Conversation

FROZEN = "conversations.jsonl"
REFERENCE = "reference"


@dataclass(frozen=True)
class CalibrationSet:
    """A frozen folder: ``conversations.jsonl`` and PNG pictures. `sha256` identifies its content."""

    folder: Path
    samples: int
    sha256: str


def freeze_samples(settings: CalibrationSettings, folder: str | Path) -> CalibrationSet:
    """Draw the samples that the settings ask for and write them to `folder`, which appears whole or not at all.

    Source ``reference`` draws from the calibration split of the reference model's questions; any other source is a
    folder with pictures and a ``data.jsonl`` of the keys `image`, `user`, `assistant`, of which `samples` lines are
    drawn at random by `seed` and kept in the order of the file. Raises `InputError` on a line that is not valid, a
    source with too few lines, and a `folder` that holds something already.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder}: expected a new or empty folder for the calibration samples")
    conversations = _draw(settings)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        content = _write(conversations, partial)
        partial.chmod(0o755)
        partial.replace(folder)
    except BaseException:
        shutil.rmtree(partial)
        raise
    return CalibrationSet(folder, settings.samples, hashlib.sha256(content).hexdigest())


def open_calibration(folder: str | Path) -> CalibrationSet:
    """The record of a folder that was frozen earlier; raises `InputError` when it is none."""
    folder = Path(folder)
    samples = sum(1 for _ in read_lines(folder, FROZEN))
    return CalibrationSet(folder, samples, file_digest(folder / FROZEN))


def load_samples(folder: str | Path) -> list[Conversation]:
    """The conversations of a frozen folder, in order; raises `InputError` when a picture is not the one frozen."""
    conversations = []
    for line in read_lines(Path(folder), FROZEN):
        line.check_keys(("image", "image_sha256", "user", "assistant"))
        picture = open_picture(line.picture())
        if _fingerprint(picture) != line.text("image_sha256"):
            line.complain("image", line.text("image"), "the picture that was frozen, it has changed since")
        conversations.append(Conversation(picture, line.text("user"), line.text("assistant")))
    return conversations


def _draw(settings: CalibrationSettings) -> Iterable[Conversation]:
    if settings.source == REFERENCE:
        from bivlm.reference import calibration_samples  # draws pictures: not needed for any other source

        return calibration_samples(settings.samples, settings.seed)
    lines = list(read_lines(Path(settings.source)))
    for line in lines:
        line.check_keys(("image", "user", "assistant"))
        line.text("user"), line.text("assistant"), line.picture()
    if settings.samples > len(lines):
        file = Path(settings.source) / FILE_NAME
        raise InputError(f"calibration.samples: found {settings.samples}, expected at most the {len(lines)} of {file}")
    chosen = sorted(random.Random(settings.seed).sample(range(len(lines)), settings.samples))
    return (_conversation(lines[index]) for index in chosen)


def _conversation(line: Line) -> Conversation:
    return Conversation(open_picture(line.picture()), line.text("user"), line.text("assistant"))


def _write(conversations: Iterable[Conversation], folder: Path) -> bytes:
    """Writes pictures and texts; returns the bytes of ``conversations.jsonl``."""
    lines = []
    for index, conversation in enumerate(conversations):
        picture = conversation.image.convert("RGB")
        name = f"{index:05d}.png"
        picture.save(folder / name, format="PNG")
        line = {
            "image": name,
            "image_sha256": _fingerprint(picture),
            "user": conversation.user,
            "assistant": conversation.assistant,
        }
        lines.append(json.dumps(line, ensure_ascii=True) + "\n")
    content = "".join(lines).encode()
    (folder / FROZEN).write_bytes(content)
    return content


def _fingerprint(picture: Image.Image) -> str:
    """SHA-256 of size and RGB pixels."""
    width, height = picture.size
    return hashlib.sha256(f"{width}x{height}\n".encode() + picture.tobytes()).hexdigest()
