"""Choose the samples: with and without an image by share, held-out ones apart, unusable ones replaced.

Held-out samples share no image with the calibration samples (without an image: no text), also where a source has
several questions about one image. They are drawn after the first 64 calibration samples, so that recipes with more
samples measure the divergence on the same ones.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

from PIL import Image

from bivlm.calibration.sources import Source, open_source, open_text_source
from bivlm.errors import InputError
from bivlm.recipe.calibration import FIRST_SAMPLES, CalibrationSettings
from bivlm.sources.images import as_rgb
from bivlm.sources.samples import CalibrationSample
from bivlm.workspace.hashing import digest


def image_digest(image: Image.Image) -> str:
    """Return the SHA-256 of size and pixels of an RGB image."""
    width, height = image.size
    return hashlib.sha256(f"{width}x{height}\n".encode() + image.tobytes()).hexdigest()


class Draw:
    """The samples that the settings request, made one at a time.

    Raises `InputError`, here or while they are drawn, as `open_source`, when a source has too few samples, and when
    more than half of what was drawn from it cannot be used.
    """

    def __init__(self, settings: CalibrationSettings) -> None:
        self._settings = settings
        texts = sum(_text_count(count, settings.text_share) for count in (settings.samples, settings.held_out))
        images = settings.samples + settings.held_out - texts
        self._supplies = [_Supply(open_source(settings, images), images, settings, "with an image")]
        if texts:
            self._supplies.append(_Supply(open_text_source(settings), texts, settings, "without an image"))

    def samples(self) -> Iterator[tuple[bool, CalibrationSample]]:
        """Yield all samples in the order of their drawing, and whether each is held out.

        Those without an image are spread evenly among the others.
        """
        settings = self._settings
        turns = list(self._turns(settings.samples))
        seen: dict[bool, set[str]] = {False: set(), True: set()}
        first, rest = turns[:FIRST_SAMPLES], turns[FIRST_SAMPLES:]
        for held_out, supplies in ((False, first), (True, self._turns(settings.held_out)), (False, rest)):
            for supply in supplies:
                sample, identity = supply.take(seen[not held_out])
                seen[held_out].add(identity)
                yield held_out, sample

    @property
    def skipped(self) -> int:
        """How many rows were replaced because they could not be used, so far."""
        return sum(len(supply.skipped) for supply in self._supplies)

    @property
    def complaints(self) -> list[str]:
        """For every source with rows that could not be used, a sentence with their number and the first."""
        return [supply.complaint() for supply in self._supplies if supply.skipped]

    @property
    def revisions(self) -> tuple[str | None, str | None]:
        """Commits on the hub of the source and of the text source, where they come from there."""
        image, text = ([supply.source.revision for supply in self._supplies] + [None])[:2]
        return image, text

    def _turns(self, count: int) -> Iterator[_Supply]:
        """Yield whose turn it is for each of `count` samples."""
        texts = _text_count(count, self._settings.text_share)
        for index in range(count):
            is_text = (index + 1) * texts // count > index * texts // count
            yield self._supplies[is_text]


@dataclass
class _Supply:
    """One source, of which `wanted` samples are needed; counts what could not be used."""

    source: Source
    wanted: int
    settings: CalibrationSettings
    kind: str
    used: int = 0
    repeated: int = 0
    skipped: list[str] = field(default_factory=list)  # why

    def __post_init__(self) -> None:
        if self.source.size is not None and self.source.size < self.wanted:
            raise self._too_few(f"at most the {self.source.size} of {self.source.name}")

    def take(self, avoid: AbstractSet[str]) -> tuple[CalibrationSample, str]:
        """Return the next usable sample that is not to be avoided, and its identity."""
        for sample in self.source.samples:
            if isinstance(sample, InputError):
                self.skipped.append(str(sample))
                if len(self.skipped) > self.wanted:
                    raise self._mostly_unusable()
            elif (identity := _identity(sample)) in avoid:
                self.repeated += 1
            else:
                self.used += 1
                return sample, identity
        if len(self.skipped) > self.used + self.repeated:
            raise self._mostly_unusable()
        lost = [f"{len(self.skipped)} that cannot be used ({self.skipped[0]})"] if self.skipped else []
        if self.repeated:
            lost.append(f"{self.repeated} that share image or text with a calibration sample")
        besides = f", beside {' and '.join(lost)}" if lost else ""
        raise self._too_few(f"at most the {self.used} of {self.source.name}{besides}")

    def complaint(self) -> str:
        """Say how many rows were skipped, and why the first."""
        count = len(self.skipped)
        return (
            f"{count} of {self.used + self.repeated + count} samples drawn from {self.source.name} cannot be used; "
            f"the first: {self.skipped[0]}"
        )

    def _mostly_unusable(self) -> InputError:
        return InputError(f"calibration: more than half, {self.complaint()}")

    def _too_few(self, valid: str) -> InputError:
        settings = self.settings
        return InputError(
            f"calibration.samples: found {settings.samples}, and calibration.held_out {settings.held_out}, which takes "
            f"{self.wanted} samples {self.kind}; expected {valid}"
        )


def _text_count(samples: int, share: float) -> int:
    """Return how many of `samples` are without an image: the share, rounded half up; one with an image remains."""
    return min(samples - 1, math.floor(samples * share + 0.5))


def _identity(sample: CalibrationSample) -> str:
    """Return what two samples must not share if one is held out: the image, or without one the texts."""
    if sample.image is not None:
        return image_digest(as_rgb(sample.image))
    return digest([sample.user, sample.assistant])
