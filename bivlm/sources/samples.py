"""What a benchmark question and a calibration conversation are, whatever data set they come from."""

from dataclasses import dataclass

from PIL import Image


@dataclass(frozen=True)
class VqaSample:
    """One question about one image, or about several, or about none.

    `image` is the first of them, or None; `further_images` are the others in their order. They stand before the text.
    `question` is the whole text of the user turn: hint, options and the "answer with ..." instruction included,
    no image token. For lettered options `choices` holds the option texts and `answers` the letter of the right one.
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
        """All pictures in their order."""
        return () if self.image is None else (self.image, *self.further_images)


@dataclass(frozen=True)
class Conversation:
    """One user turn and the assistant's reply, as used for calibration; about one image, or None without any."""

    image: Image.Image | None
    user: str
    assistant: str
