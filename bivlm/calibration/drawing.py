"""Which conversations become samples: pictures and text mixed by share, held-out ones apart, unusable ones replaced.

Held-out samples are drawn after the calibration samples and share no picture with them (text-only ones: no
conversation), also where a source has several questions about one picture.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator

from PIL import Image

from bivlm.calibration.exchanges import UnusableError
from bivlm.calibration.sources import Source, open_source, open_text_source
from bivlm.errors import InputError
from bivlm.recipe.calibration import CalibrationSettings
from bivlm.sources.images import as_rgb
from bivlm.sources.samples import Conversation
from bivlm.workspace.hashing import digest


def text_count(samples: int, share: float) -> int:
    """How many of `samples` are without a picture: the share, rounded half up; one with a picture always remains."""
    return min(samples - 1, math.floor(samples * share + 0.5))


def picture_digest(picture: Image.Image) -> str:
    """SHA-256 of size and pixels of an RGB picture."""
    width, height = picture.size
    return hashlib.sha256(f"{width}x{height}\n".encode() + picture.tobytes()).hexdigest()


class Draw:
    """The samples that the settings ask for, made one at a time: first `samples`, then `held_out`.

    Raises `InputError`, here or while they are drawn, as `open_source`, when a source has too few conversations, and
    when more than half of what was drawn from it cannot be used.
    """

    def __init__(self, settings: CalibrationSettings) -> None:
        self._settings = settings
        self._texts = text_count(settings.samples, settings.text_share)
        self._held_texts = text_count(settings.held_out, settings.text_share)
        texts = self._texts + self._held_texts
        pictures = settings.samples + settings.held_out - texts
        self._pictures = _Supply(open_source(settings, pictures), pictures, settings, "with a picture")
        self._text = _Supply(open_text_source(settings), texts, settings, "without a picture") if texts else None
        self._seen: set[str] = set()

    def samples(self) -> Iterator[Conversation]:
        """The samples to calibrate on, those without a picture spread evenly among the others."""
        for supply in self._turns(self._settings.samples, self._texts):
            conversation, identity = supply.take(frozenset())
            self._seen.add(identity)
            yield conversation

    def held_out(self) -> Iterator[Conversation]:
        """The held-out samples; to be called when `samples` has ended."""
        for supply in self._turns(self._settings.held_out, self._held_texts):
            yield supply.take(self._seen)[0]

    @property
    def skipped(self) -> int:
        """How many entries were replaced because they could not be used, so far."""
        return sum(supply.skipped for supply in self._supplies)

    @property
    def complaints(self) -> list[str]:
        """For every source with entries that could not be used, a sentence with their number and the first."""
        return [supply.complaint() for supply in self._supplies if supply.skipped]

    @property
    def revisions(self) -> tuple[str | None, str | None]:
        """Commits on the hub of the source and of the text source, where they come from there."""
        return self._pictures.source.revision, self._text.source.revision if self._text is not None else None

    @property
    def _supplies(self) -> list[_Supply]:
        return [self._pictures, *([self._text] if self._text is not None else [])]

    def _turns(self, count: int, texts: int) -> Iterator[_Supply]:
        """Whose turn it is for each of `count` samples."""
        for index in range(count):
            is_text = (index + 1) * texts // count > index * texts // count
            yield self._text if is_text and self._text is not None else self._pictures


class _Supply:
    """One source, of which `wanted` conversations are needed; counts what could not be used."""

    def __init__(self, source: Source, wanted: int, settings: CalibrationSettings, kind: str) -> None:
        self.source, self.skipped = source, 0
        self._wanted, self._settings, self._kind = wanted, settings, kind
        self._used = self._repeated = 0
        self._first: UnusableError | None = None
        if source.size is not None and source.size < wanted:
            raise self._too_few(f"at most the {source.size} of {source.name}")

    def take(self, avoid: set[str] | frozenset[str]) -> tuple[Conversation, str]:
        """The next usable conversation that is not to be avoided, and what it is known by."""
        for entry in self.source.entries:
            if isinstance(entry, UnusableError):
                self.skipped += 1
                self._first = self._first or entry
                if self.skipped > self._wanted:
                    raise self._mostly_unusable()
                continue
            identity = _identity(entry)
            if identity in avoid:
                self._repeated += 1
                continue
            self._used += 1
            return entry, identity
        if self.skipped > self._used + self._repeated:
            raise self._mostly_unusable()
        lost = [f"{self.skipped} that cannot be used ({self._first})"] if self.skipped else []
        if self._repeated:
            lost.append(f"{self._repeated} that share picture or text with a calibration sample")
        besides = f", beside {' and '.join(lost)}" if lost else ""
        raise self._too_few(f"at most the {self._used} of {self.source.name}{besides}")

    def complaint(self) -> str:
        """How many entries were skipped, and the first."""
        drawn = self._used + self._repeated + self.skipped
        return (
            f"{self.skipped} of {drawn} entries drawn from {self.source.name} cannot be used; the first: {self._first}"
        )

    def _mostly_unusable(self) -> InputError:
        return InputError(f"calibration: more than half, {self.complaint()}")

    def _too_few(self, valid: str) -> InputError:
        settings = self._settings
        return InputError(
            f"calibration.samples: found {settings.samples}, and calibration.held_out {settings.held_out}, which takes "
            f"{self._wanted} conversations {self._kind}; expected {valid}"
        )


def _identity(conversation: Conversation) -> str:
    """What two samples must not share if one is held out: the picture, or without one the conversation."""
    if conversation.image is not None:
        return picture_digest(as_rgb(conversation.image))
    return digest([conversation.user, conversation.assistant])
