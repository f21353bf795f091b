"""Calibration samples, frozen: images and texts in a folder, with one hash over all of it.

Beside the samples to calibrate on, the folder holds the held-out ones that the divergence is measured on. The hash is
over what the samples are (texts, and the pixels of the images), not over how a version of an image library writes
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

from bivlm.calibration.drawing import Draw, image_digest
from bivlm.errors import InputError
from bivlm.recipe.calibration import CalibrationSettings
from bivlm.sources.images import as_rgb, clipped_rgb, open_image
from bivlm.sources.json_rows import read_lines
from bivlm.sources.rows import Row
from bivlm.sources.samples import CalibrationSample
from bivlm.workspace.hashing import digest, file_digest

FROZEN = "conversations.jsonl"
HELD_OUT = "held_out.jsonl"
RECORD = "drawn.json"


@dataclass(frozen=True)
class CalibrationSet:
    """A frozen folder: ``conversations.jsonl``, ``held_out.jsonl``, PNG images, and ``drawn.json`` on how it came.

    Attributes:
        folder: where it is.
        samples: samples to calibrate on.
        held_out: samples that calibration never sees.
        text_only: how many of `samples` are without an image.
        skipped: rows of the sources that were drawn, could not be used, and were replaced.
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
    """Draw the samples that the settings request and write them to `folder`, which appears whole or not at all.

    One image is held at a time. Rows of published data sets that cannot be used are replaced by the next drawn, and a
    warning gives their number. Raises `InputError` as `Draw` does, and when `folder` holds something already;
    ConnectionError when the hub cannot be reached.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder}: expected a new or empty folder for the calibration samples")
    draw = Draw(settings)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        _write(draw.samples(), partial)
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
    """Return the record of a folder that was frozen earlier; raises `InputError` if there is none."""
    folder = Path(folder)
    images = [row.values.get("image") for row in read_lines(folder / FROZEN)]
    held_out = sum(1 for _ in read_lines(folder / HELD_OUT))
    (record,) = read_lines(folder / RECORD)
    record.check_keys(("skipped", "revision", "text_revision"))
    return CalibrationSet(
        folder=folder,
        samples=len(images),
        held_out=held_out,
        text_only=images.count(None),
        sha256=digest({name: file_digest(folder / name) for name in (FROZEN, HELD_OUT)}),
        **record.values,
    )


def load_samples(folder: str | Path) -> list[CalibrationSample]:
    """Return the samples to calibrate on, in order; raises `InputError` when an image is not the one frozen."""
    return [_sample(row) for row in read_lines(Path(folder) / FROZEN)]


def load_held_out(folder: str | Path) -> list[CalibrationSample]:
    """Return the samples that calibration never sees, in order; raises as `load_samples`."""
    return [_sample(row) for row in read_lines(Path(folder) / HELD_OUT)]


def _sample(row: Row) -> CalibrationSample:
    row.check_keys(("image", "image_sha256", "user", "assistant"))
    image = None
    if row.values["image"] is not None:
        # As it was written: of a file with a transparent palette, earlier versions froze RGB with a transparent colour.
        image = open_image(row.image_path("image"), clipped_rgb)
        if image_digest(image) != row.text("image_sha256"):
            row.complain("image", "the image that was frozen, it has changed since")
    return CalibrationSample(image, row.text("user"), row.text("assistant"))


def _write(samples: Iterable[tuple[bool, CalibrationSample]], folder: Path) -> None:
    """Write the texts of both parts, of samples and whether they are held out, and the images beside them."""
    lines: dict[bool, list[str]] = {False: [], True: []}
    for held_out, sample in samples:
        line = {"image": None, "image_sha256": None, "user": sample.user, "assistant": sample.assistant}
        if sample.image is not None:
            image, name = as_rgb(sample.image), f"{'held-' if held_out else ''}{len(lines[held_out]):05d}.png"
            line |= {"image": name, "image_sha256": image_digest(image)}
            image.save(folder / name, format="PNG")
        lines[held_out].append(json.dumps(line, ensure_ascii=True) + "\n")
    for held_out, file_name in ((False, FROZEN), (True, HELD_OUT)):
        (folder / file_name).write_bytes("".join(lines[held_out]).encode())
