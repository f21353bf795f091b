"""The model that MLflow serves: the packed checkpoint, loaded as it is stored.

MLflow copies this file into every registered version and runs it by itself, with whatever bivlm is installed then. It
imports only what `bivlm` itself offers, so that modules can move.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator

import mlflow
import pandas as pd
from mlflow.pyfunc import PythonModel, PythonModelContext

import bivlm
from bivlm.errors import InputError


class PackedVisionLanguageModel(PythonModel):
    """Answers questions about images.

    Input is a table with the columns `image` (an image file, base64) and `question`; output is one answer per row.
    """

    def load_context(self, context: PythonModelContext) -> None:
        self.model, self.processor = bivlm.load_model(context.artifacts["checkpoint"])

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, int] | None = None
    ) -> list[str]:
        max_new_tokens = (params or {}).get("max_new_tokens", 16)
        return bivlm.answer(self.model, self.processor, _questions(model_input), max_new_tokens)


def _questions(table: pd.DataFrame) -> Iterator[tuple[bytes, str]]:
    """Yield the image file and text of each row; raises `InputError` naming a row whose image is not base64."""
    for number, row in enumerate(table.itertuples()):
        try:
            yield base64.b64decode(row.image), row.question
        except (TypeError, ValueError) as error:
            raise InputError(f"question {number}, image: expected a file in base64: {error}") from None


mlflow.models.set_model(PackedVisionLanguageModel())
