"""Draw and freeze samples in a test, and look at what was frozen."""

from pathlib import Path

from bivlm.calibration.frozen import CalibrationSet, freeze_samples, load_held_out, load_samples
from bivlm.recipe.calibration import CalibrationSettings
from bivlm.sources.samples import CalibrationSample


def freeze(place: Path, source: object = "reference", samples: int = 6, held_out: int = 2, name="frozen", **others):
    """Freeze in a folder `name` below `place`; `others` are further settings."""
    settings = CalibrationSettings(source=str(source), samples=samples, held_out=held_out, **others)
    return freeze_samples(settings, place / name)


def parts(frozen: CalibrationSet) -> tuple[list[CalibrationSample], list[CalibrationSample]]:
    """The samples to calibrate on, and the held-out ones."""
    return load_samples(frozen.folder), load_held_out(frozen.folder)


def said(frozen: CalibrationSet) -> list[tuple[str, str]]:
    """The texts of all samples."""
    return [(sample.user, sample.assistant) for part in parts(frozen) for sample in part]


def shown(frozen: CalibrationSet) -> list[set[bytes]]:
    """The pixels of both parts."""
    return [{sample.image.tobytes() for sample in part} for part in parts(frozen)]
