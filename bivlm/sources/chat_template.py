"""Turn a question and its images into model inputs: the chat template, then the processor."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import BatchFeature, PreTrainedModel, ProcessorMixin

from bivlm.errors import InputError


def render_prompt(processor: ProcessorMixin, user: str, *, image: bool | int = True) -> str:
    """Return images and the user's text as the chat template writes them, up to where the assistant begins.

    `image` is how many images there are; without any it is the text alone. The template gets the turn as a list of
    parts, or, if it cannot write that, as a string: the image placeholder once per image, a line break, the text.
    Raises `InputError` naming the template when it fails, writes another number of placeholders or leaves out a text;
    when there is none; and when the text holds the image placeholder of the model.
    """
    return _render(processor, user, None, int(image))


def render_dialogue(processor: ProcessorMixin, user: str, assistant: str, *, image: bool = True) -> str:
    """Return the same with the assistant's reply and the end of its turn; raises as `render_prompt`."""
    return _render(processor, user, assistant, int(image))


def encode(
    processor: ProcessorMixin,
    model: PreTrainedModel,
    texts: Sequence[str],
    images: Sequence[Image.Image | Sequence[Image.Image] | None],
) -> BatchFeature:
    """Return the model inputs of rendered texts, padded on the left, on the model's device and in its dtype.

    Each text has one image or several, or each has None: then there are no pixel values. Raises ValueError for a
    mixture, which processors do not agree on. A template that writes the beginning-of-sequence token gets no second one
    from the tokenizer.
    """
    if len({image is None for image in images}) > 1:
        raise ValueError("texts with and without an image in one batch; expected one kind, or batches of one")
    shown = {}
    if images[0] is not None:
        shown = {"images": [list(image) if isinstance(image, Sequence) else [image] for image in images]}
    begin = processor.tokenizer.bos_token
    marked = {"add_special_tokens": False} if begin and texts[0].startswith(begin) else {}
    inputs = processor(
        text=list(texts), **shown, padding=len(texts) > 1, padding_side="left", return_tensors="pt", **marked
    )
    return inputs.to(model.device, dtype=model.dtype if model.dtype.is_floating_point else torch.float32)


def _refuse_placeholders(processor: ProcessorMixin, text: str) -> None:
    for name in ("image_token", "video_token"):
        token = getattr(processor, name, None)
        if isinstance(token, str) and token in text:
            raise InputError(f"text {text!r} holds {token!r}, which stands for an image: expected text without it")


def _render(processor: ProcessorMixin, user: str, assistant: str | None, images: int) -> str:
    for text in (user, assistant or ""):
        _refuse_placeholders(processor, text)
    template, place = _template(processor)
    problems = []
    problem: str | None
    for form, turns in _forms(processor, user, assistant, images):
        try:
            written = processor.apply_chat_template(
                turns, chat_template=template, add_generation_prompt=assistant is None
            )
        except Exception as error:  # the template is a program of the checkpoint's, and may fail in any way
            problem = f"it fails with {type(error).__name__}: {_cut(str(error))}"
        else:
            problem = _problem(processor, turns, written, (user, assistant), images)
        if problem is None:
            return written
        problems.append(f"given {form}, {problem}")
    raise InputError(f"{place}: expected a chat template that writes images and text; {'; '.join(problems)}")


def _forms(
    processor: ProcessorMixin, user: str, assistant: str | None, images: int
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Yield the forms of the turns that chat templates are written for, the usual one first, with their names."""

    def turns(content: Any, reply: Any) -> list[dict[str, Any]]:
        user_turn = {"role": "user", "content": content}
        return [user_turn] if assistant is None else [user_turn, {"role": "assistant", "content": reply}]

    parts = [*({"type": "image"} for _ in range(images)), {"type": "text", "text": user}]
    yield "parts", turns(parts, [{"type": "text", "text": assistant}])
    if assistant is not None:
        yield "parts and a reply that is a string", turns(parts, assistant)
    token = getattr(processor, "image_token", None) if images else ""
    if isinstance(token, str):
        yield "a string", turns("\n".join([*[token] * images, user]), assistant)


def _problem(
    processor: ProcessorMixin, turns: list[dict[str, Any]], written: str, texts: tuple[str, str | None], images: int
) -> str | None:
    """Return what is wrong with the text that the template made of the turns; None if nothing is."""
    lists = [turn["content"] for turn in turns if isinstance(turn["content"], list)]
    if any(text in written for each in lists for text in (str(each), json.dumps(each, ensure_ascii=False))):
        return f"it prints them as they are: {_cut(repr(written))}"
    user, assistant = texts
    if _spaced(user) not in _spaced(written):
        return f"it leaves out the text {_cut(repr(user))}: {_cut(repr(written))}"
    token = getattr(processor, "image_token", None)
    if isinstance(token, str) and (found := written.count(token)) != images:
        return f"it writes {token} {found} times, expected {images}: {_cut(repr(written))}"
    # A template may leave out the reasoning before a reply.
    if assistant is not None and _spaced(assistant.rpartition("</think>")[2]) not in _spaced(written):
        return f"it leaves out the reply {_cut(repr(assistant))}: {_cut(repr(written))}"
    return None


def _spaced(text: str) -> str:
    """Return the text with one space for any white space, which templates trim."""
    return " ".join(text.split())


def _cut(text: str) -> str:
    return text if len(text) <= 200 else text[:197] + "..."


def _template(processor: ProcessorMixin) -> tuple[str, str]:
    """Return the chat template of the processor, else of its tokenizer, and where it is written.

    Raises `InputError` when there is none.
    """
    folder = Path(processor.tokenizer.name_or_path)
    own = getattr(processor, "chat_template", None)
    template = own or getattr(processor.tokenizer, "chat_template", None)
    files = ("chat_template.jinja", "chat_template.json") if own else ("chat_template.jinja",)
    place = next((str(folder / file) for file in files if (folder / file).is_file()), None)
    config = "processor_config.json" if own else "tokenizer_config.json"
    place = place or f"{folder / config}, key 'chat_template'"
    if isinstance(template, dict) and template:
        if "default" not in template:
            raise InputError(f"{place}: found the templates {', '.join(map(str, template))}, expected one 'default'")
        template = template["default"]
    if not template:
        raise InputError(
            f"{folder}: {type(processor).__name__} has no chat template: expected chat_template.jinja in the "
            "checkpoint's folder, or the key 'chat_template' in its tokenizer_config.json"
        )
    if not isinstance(template, str):
        raise InputError(f"{place}: found {type(template).__name__}, expected a chat template as text")
    return template, place
