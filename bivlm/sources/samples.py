"""Samples, whatever data set they come from: questions of a benchmark, and what a model is calibrated on."""

from dataclasses import dataclass
from typing import Any

from PIL import Image


@dataclass(frozen=True)
class VqaSample:
    """One question about one image, about several, or about none.

    Attributes:
        question_id: distinct within its set.
        image_id: the same for questions about the same image.
        image: the first image, or None.
        question: the whole text of the user turn without an image token: hint, options and "answer with ..." included.
        answers: accepted answers; for lettered options the letter of the right one.
        choices: the texts of lettered options.
        category: accuracy is also reported by category; "" for none.
        further_images: the images after the first, in order. All images stand before the text.
    """

    question_id: str
    image_id: str
    image: Image.Image | None
    question: str
    answers: tuple[str, ...]
    choices: tuple[str, ...] | None = None
    category: str = ""
    further_images: tuple[Image.Image, ...] = ()

    @property
    def images(self) -> tuple[Image.Image, ...]:
        """All images in order."""
        return () if self.image is None else (self.image, *self.further_images)

    @property
    def texts(self) -> dict[str, Any]:
        """Everything but the images, ready for JSON."""
        return {name: value for name, value in vars(self).items() if name not in ("image", "further_images")}


@dataclass(frozen=True)
class CalibrationSample:
    """One user turn and the assistant's reply, about one image or (None) about no image."""

    image: Image.Image | None
    user: str
    assistant: str
