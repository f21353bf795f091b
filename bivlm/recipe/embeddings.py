"""Recipe settings of the embedding of tokens and the head."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from bivlm.packing import grouped


class EmbeddingSettings(BaseModel):
    """How one table is rounded: codes of `bits`, `group_size` neighbouring columns of a row on one grid."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    bits: Literal[4, 8]
    group_size: int = Field(default=64, ge=0, le=grouped.LARGEST_GROUP)  # 0: one group per row


class RecipeEmbeddings(BaseModel):
    """Recipe settings of ``tables``; at least one of the two.

    Attributes:
        tokens: the embedding of tokens; with it a head that shares its tensor.
        head: the layer that gives the logits, where it has a tensor of its own.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    tokens: EmbeddingSettings | None = None
    head: EmbeddingSettings | None = None

    @model_validator(mode="before")
    @classmethod
    def _bits_alone(cls, value: Any) -> Any:
        """Expand ``tables: 4`` to ``tables: {tokens: 4, head: 4}``, and ``tokens: 4`` to ``tokens: {bits: 4}``."""
        if type(value) is int:
            value = {"tokens": value, "head": value}
        if isinstance(value, dict):
            return {key: {"bits": each} if type(each) is int else each for key, each in value.items()}
        return value

    @model_validator(mode="after")
    def _says_something(self) -> RecipeEmbeddings:
        if self.tokens is None and self.head is None:
            raise ValueError("expected 4, 8, or a mapping with tokens, head or both")
        return self
