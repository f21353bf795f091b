"""From a question and a picture to what a model takes in: the chat template, then the processor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from transformers import BatchFeature, PreTrainedModel, ProcessorMixin

from bivlm.errors import InputError


def render_prompt(processor: ProcessorMixin, user: str, *, image: bool | int = True) -> str:
    """A picture and the user's text as the chat template writes them, up to where the assistant begins.

    `image` is how many pictures there are; without any it is the text alone. Raises `InputError` when there is no chat
    template, or when the text holds the image placeholder of the model.
    """
    return _render(processor, [_user_turn(processor, user, image)], add_generation_prompt=True)


def render_dialogue(processor: ProcessorMixin, user: str, assistant: str, *, image: bool = True) -> str:
    """The same with the assistant's reply and the end of its turn; raises as `render_prompt`."""
    _refuse_placeholders(processor, assistant)
    reply = {"role": "assistant", "content": [{"type": "text", "text": assistant}]}
    return _render(processor, [_user_turn(processor, user, image), reply], add_generation_prompt=False)


def encode(
    processor: ProcessorMixin,
    model: PreTrainedModel,
    texts: Sequence[str],
    images: Sequence[Image.Image | Sequence[Image.Image] | None],
) -> BatchFeature:
    """Model inputs of rendered texts, padded on the left, on the model's device and in its dtype.

    Each text has one picture or several, or each has None: then there are no pixel values. Raises ValueError for a
    mixture, which processors do not agree on. A template that writes the beginning-of-sequence token gets no second one
    from the tokenizer.
    """
    if len({image is None for image in images}) > 1:
        raise ValueError("texts with and without a picture in one batch; expected one kind, or batches of one")
    pictures = (
        {}
        if images[0] is None
        else {"images": [list(image) if isinstance(image, Sequence) else [image] for image in images]}
    )
    begin = processor.tokenizer.bos_token
    marked = {"add_special_tokens": False} if begin and texts[0].startswith(begin) else {}
    inputs = processor(
        text=list(texts),
        **pictures,
        padding=len(texts) > 1,
        padding_side="left",
        return_tensors="pt",
        **marked,
    )
    return inputs.to(model.device, dtype=model.dtype if model.dtype.is_floating_point else torch.float32)


def _user_turn(processor: ProcessorMixin, user: str, image: bool | int) -> dict:
    _refuse_placeholders(processor, user)
    pictures = [{"type": "image"} for _ in range(int(image))]
    return {"role": "user", "content": [*pictures, {"type": "text", "text": user}]}


def _refuse_placeholders(processor: ProcessorMixin, text: str) -> None:
    for name in ("image_token", "video_token"):
        token = getattr(processor, name, None)
        if isinstance(token, str) and token in text:
            raise InputError(f"text {text!r} holds {token!r}, which stands for a picture: expected text without it")


def _render(processor: ProcessorMixin, turns: list[dict], add_generation_prompt: bool) -> str:
    if not getattr(processor, "chat_template", None):
        raise InputError(
            f"{type(processor).__name__} has no chat template: expected chat_template.jinja in the checkpoint's folder"
        )
    return processor.apply_chat_template(turns, add_generation_prompt=add_generation_prompt)
