"""The model that MLflow serves: the packed checkpoint, loaded as it is stored. MLflow runs this file by itself."""

from __future__ import annotations

import base64
import io

import mlflow
import pandas as pd
from mlflow.pyfunc import PythonModel, PythonModelContext
from PIL import Image


class PackedVisionLanguageModel(PythonModel):
    """Answers questions about pictures.

    Input is a table with the columns `image` (a picture file, base64) and `question`; output is one answer a row.
    """

    def load_context(self, context: PythonModelContext) -> None:
        from bivlm.evaluation import load_model

        self.model, self.processor = load_model(context.artifacts["checkpoint"])

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, int] | None = None
    ) -> list[str]:
        from bivlm.evaluation.generation import answer_batch
        from bivlm.samples import VqaSample

        samples = []
        for index, row in enumerate(model_input.itertuples()):
            image = Image.open(io.BytesIO(base64.b64decode(row.image))).convert("RGB")
            samples.append(VqaSample(str(index), str(index), image, row.question, answers=()))
        max_new_tokens = (params or {}).get("max_new_tokens", 16)
        return answer_batch(self.model, self.processor, samples, max_new_tokens)


mlflow.models.set_model(PackedVisionLanguageModel())
