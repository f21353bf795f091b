"""Find the reply of a sample among the tokens that the chat template makes of it."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import BatchFeature, PreTrainedModel, ProcessorMixin

from bivlm.errors import InputError
from bivlm.sources.chat_template import encode, render_dialogue, render_prompt
from bivlm.sources.samples import CalibrationSample
from bivlm.workspace.hashing import digest

MAX_POSITIONS = 32


@dataclass(frozen=True)
class Reply:
    """The model inputs of a whole sample (batch of one) and which of its tokens are judged."""

    inputs: BatchFeature
    start: int  # index of the first token of the reply
    count: int  # tokens judged, at most MAX_POSITIONS

    @property
    def tokens_sha256(self) -> str:
        """Hash of all tokens up to the last one judged: two models must read the same."""
        tokens = self.inputs["input_ids"][0, : self.start + self.count].tolist()
        return digest(tokens)


def read_reply(model: PreTrainedModel, processor: ProcessorMixin, sample: CalibrationSample) -> Reply:
    """Find the reply among the tokens of a sample.

    The prompt rendered alone (with what makes the assistant begin) must be a prefix of the whole sample's rendering.
    The first token that differs, or is new, is the reply's first. Raises `InputError` when the chat template writes the
    two in different ways.
    """
    has_image = sample.image is not None
    prompt = render_prompt(processor, sample.user, image=has_image)
    whole = render_dialogue(processor, sample.user, sample.assistant, image=has_image)
    if not whole.startswith(prompt):
        raise InputError(
            f"chat template of {type(processor).__name__}: expected the generation prompt {prompt!r} to be the "
            f"beginning of the conversation with its reply {whole!r}, so that the tokens of the reply can be told apart"
        )
    inputs = encode(processor, model, [whole], [sample.image])
    tokens = inputs["input_ids"][0].tolist()
    before = encode(processor, model, [prompt], [sample.image])["input_ids"][0].tolist()
    # A tokenizer may merge the end of the prompt with the beginning of the reply: such a token belongs to the reply.
    start = next((i for i, (a, b) in enumerate(zip(tokens, before, strict=False)) if a != b), len(before))
    if start >= len(tokens):
        raise InputError(f"sample {sample.user!r}: the reply {sample.assistant!r} has no tokens")
    return Reply(inputs, start, min(MAX_POSITIONS, len(tokens) - start))
