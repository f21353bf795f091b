"""What a benchmark question and a calibration conversation are, whatever data set they come from."""

from dataclasses import dataclass

from PIL import Image


@dataclass(frozen=True)
class VqaSample:
    """One question about one image.

    `question` is the whole text of the user turn: hint, options and the "answer with ..." instruction included,
    no image token. For lettered options `choices` holds the option texts and `answers` the letter of the right one.
    """

    question_id: str
    image_id: str
    image: Image.Image
    question: str
    answers: tuple[str, ...]
    choices: tuple[str, ...] | None = None
    category: str = ""


@dataclass(frozen=True)
class Conversation:
    """One user turn and the assistant's reply, as used for calibration; about one image, or None without any."""

    image: Image.Image | None
    user: str
    assistant: str
