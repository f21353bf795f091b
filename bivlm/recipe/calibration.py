"""Settings of calibration: where samples come from, how many, and how their tokens count."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

REFERENCE = "reference"
HUB = "hf:"
TEXT_SUFFIXES = (".jsonl", ".json")
INSTRUCTION = "Describe the picture."
FIRST_SAMPLES = 64  # drawn before the held-out ones


class TokenWeights(BaseModel):
    """How much a token's input counts in a layer's second moment ``H = sum_t g_t^2 x_t x_t^T / sum_t g_t^2``.

    Attributes:
        weights: ``uniform``: g is 1; ``modality``: g^2 is 1 for text and `image` for image tokens; ``gradient``: g is
            taken from the gradient of the KL to full precision at the reply's tokens.
        image: g^2 of an image token relative to a text token's; for ``modality``.
        shrink: how far g is shrunk to the mean of its modality, 0 not at all and 1 wholly; for ``gradient``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    weights: Literal["uniform", "modality", "gradient"] = "uniform"
    image: float = Field(default=0.1, gt=0, le=1, allow_inf_nan=False)
    shrink: float = Field(default=0.2, ge=0, le=1, allow_inf_nan=False)


class CalibrationSettings(BaseModel):
    """Where calibration samples come from, how many, and the seed that freezes the choice.

    Attributes:
        source: ``reference``; a folder with ``data.jsonl``; a ``.jsonl`` or ``.json`` file; or
            ``hf:OWNER/NAME``, a data set of the Hugging Face hub, ``hf:FOLDER`` for one that lies in a folder.
        samples: how many calibration and tuning see.
        held_out: how many more they never see; the KL to full precision is measured on these.
        seed: of every random choice.
        images: folder of the images that a file, or a data set with paths, names; by default the file's own.
        revision, subset, split: of the ``hf:`` data set. A revision that is not given is resolved to a commit and
            recorded; a data set with one split, or with one called ``train``, needs no `split`.
        image_column: column of the images.
        text_column: column of the captions, each a string or a list of them of which the first is taken.
        conversation_column: column of conversations; the first answered user turn and its reply are taken.
        instruction: the user's turn before a caption.
        text_share: share of samples, held-out ones alike, without an image.
        text_source: where those come from: ``reference``, a ``.jsonl`` or ``.json`` file, or ``hf:`` as above.
        text_revision, text_subset, text_split: of an ``hf:`` data set in `text_source`.
        tokens: how much each token counts.
        inputs: whether a block is calibrated on what the full-precision blocks before it give, or on what the already
            quantized ones do.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    source: str = Field(default=REFERENCE, min_length=1)
    samples: int = Field(default=64, ge=1)
    held_out: int = Field(default=64, ge=1)
    seed: int = Field(default=0, ge=0)
    images: str | None = None
    revision: str | None = None
    subset: str | None = None
    split: str | None = None
    image_column: str | None = None
    text_column: str | None = None
    conversation_column: str | None = None
    instruction: str = Field(default=INSTRUCTION, min_length=1)
    text_share: float = Field(default=0.0, ge=0, lt=1, allow_inf_nan=False)
    text_source: str | None = Field(default=None, validate_default=True)
    text_revision: str | None = None
    text_subset: str | None = None
    text_split: str | None = None
    tokens: TokenWeights = TokenWeights()
    inputs: Literal["full_precision", "quantized"] = "full_precision"

    @field_validator("source", "text_source")
    @classmethod
    def _names_something(cls, value: str | None) -> str | None:
        if value == HUB:
            raise ValueError(f"expected {HUB}OWNER/NAME or {HUB}FOLDER")
        return value

    @field_validator("images")
    @classmethod
    def _has_paths(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is not None and info.data.get("source") == REFERENCE:
            raise ValueError(f"the source {REFERENCE!r} draws its images; expected a source that names images")
        return value

    @field_validator("revision", "subset", "split", "image_column", "text_column", "conversation_column", "instruction",
                     "text_revision", "text_subset", "text_split")  # fmt: skip
    @classmethod
    def _of_a_data_set(cls, value: str | None, info: ValidationInfo) -> str | None:
        key = "text_source" if info.field_name in ("text_revision", "text_subset", "text_split") else "source"
        # `instruction` is written out in the canonical recipe, so that its default must be accepted anywhere. A source
        # that is not there was refused already; one complaint is enough.
        if value not in (None, INSTRUCTION) and key in info.data and not (info.data[key] or "").startswith(HUB):
            raise ValueError(f"only with a {key} of the form {HUB}OWNER/NAME, {key} is {info.data[key]!r}")
        return value

    @field_validator("conversation_column")
    @classmethod
    def _captions_or_conversations(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is not None and info.data.get("text_column") is not None:
            raise ValueError("text_column names captions already; expected one of the two")
        return value

    @field_validator("instruction")
    @classmethod
    def _before_captions(cls, value: str, info: ValidationInfo) -> str:
        if value != INSTRUCTION and info.data.get("conversation_column") is not None:
            raise ValueError("a conversation has a user's turn of its own; expected text_column, or no instruction")
        return value

    @field_validator("text_source")
    @classmethod
    def _share_and_source(cls, value: str | None, info: ValidationInfo) -> str | None:
        if "text_share" not in info.data:  # refused already
            return value
        share = info.data["text_share"]
        if share > 0 and value is None:
            raise ValueError(f"text_share is {share}: expected {REFERENCE}, a .jsonl file or {HUB}OWNER/NAME")
        if value is not None and share == 0:
            raise ValueError("text_share is 0: expected a share above 0, or no text_source")
        if value is not None and not (
            value == REFERENCE or value.startswith(HUB) or value.lower().endswith(TEXT_SUFFIXES)
        ):
            raise ValueError(f"expected {REFERENCE}, a {' or '.join(TEXT_SUFFIXES)} file, or {HUB}OWNER/NAME")
        return value

    def held_out_selection(self) -> dict[str, Any]:
        """Return what determines the held-out samples, ready for JSON."""
        return self.selection() | {"samples": min(self.samples, FIRST_SAMPLES)}

    def selection(self) -> dict[str, Any]:
        """Return what determines the samples, ready for JSON; settings that are None are left out."""
        return self.model_dump(mode="json", exclude={"tokens", "inputs"}, exclude_none=True)


def held_out_samples(calibration: Mapping[str, Any]) -> str:
    """Say which samples the KL to full precision is measured on: "64 held-out samples of the reference scenes".

    `calibration` is that of a recipe, as JSON.
    """
    source, texts = calibration["source"], calibration.get("text_source")
    said = f"{calibration['held_out']} held-out samples of {'the reference scenes' if source == REFERENCE else source}"
    return said + (f" and texts of {'the reference generator' if texts == REFERENCE else texts}" if texts else "")
