"""The model that MLflow serves: the packed checkpoint, loaded as it is stored. MLflow runs this file by itself."""

from __future__ import annotations

import base64
from typing import Any

import mlflow
import pandas as pd
from mlflow.pyfunc import PythonModel, PythonModelContext
from PIL import Image

from bivlm.errors import InputError
from bivlm.sources.images import decode_image


class PackedVisionLanguageModel(PythonModel):
    """Answers questions about images.

    Input is a table with the columns `image` (an image file, base64) and `question`; output is one answer per row.
    """

    def load_context(self, context: PythonModelContext) -> None:
        from bivlm.evaluation.generation import load_model

        self.model, self.processor = load_model(context.artifacts["checkpoint"])

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, int] | None = None
    ) -> list[str]:
        from bivlm.evaluation.generation import answer_batch
        from bivlm.sources.samples import VqaSample

        samples = []
        for index, row in enumerate(model_input.itertuples()):
            image = _image(row.image, f"row {index}, column 'image'")
            samples.append(VqaSample(str(index), str(index), image, row.question, answers=()))
        max_new_tokens = (params or {}).get("max_new_tokens", 16)
        return answer_batch(self.model, self.processor, samples, max_new_tokens)


def _image(value: Any, name: str) -> Image.Image:
    """Return the image that is given as base64; raises `InputError` with `name`."""
    try:
        content = base64.b64decode(value)
    except (TypeError, ValueError) as error:
        raise InputError(f"{name}: expected the file of an image in base64: {error}") from None
    return decode_image(content, name)


mlflow.models.set_model(PackedVisionLanguageModel())
