"""The file by which MLflow serves a registered model, and what it was when earlier models were registered."""

import ast
import base64
import inspect

import numpy as np
import pandas as pd
import pytest
from image_files import png
from mlflow.pyfunc import PythonModelContext

import bivlm
from bivlm.errors import InputError
from bivlm.reference import CHECKPOINT
from tasks import served_model

# What the file imported when models were registered that may be served today.
EARLIER_IMPORTS = [
    """
from bivlm.errors import InputError
from bivlm.evaluation import load_model
from bivlm.evaluation.generation import answer_batch
from bivlm.pictures import decode_picture as decode_image
from bivlm.samples import VqaSample
""",
    """
from bivlm.errors import InputError
from bivlm.evaluation.generation import answer_batch, load_model
from bivlm.sources.images import decode_image
from bivlm.sources.samples import VqaSample
""",
]
RED = png(np.full((64, 64, 3), (200, 0, 0)), 8, 2)
QUESTION = "Is there a red shape? Answer with yes or no."


@pytest.fixture(scope="module")
def served():
    model = served_model.PackedVisionLanguageModel()
    model.load_context(PythonModelContext({"checkpoint": str(CHECKPOINT)}, {}))
    return model


def predict(model, *images, **params):
    return model.predict(None, pd.DataFrame({"image": images, "question": [QUESTION] * len(images)}), **params)


def test_it_imports_only_what_the_package_itself_offers():
    nodes = list(ast.walk(ast.parse(inspect.getsource(served_model))))
    modules = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    assert {name for name in modules if name.partition(".")[0] in ("bivlm", "tasks")} == {"bivlm.errors"}
    used = {node.attr for node in nodes if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "bivlm"}
    assert used and used <= set(bivlm.__all__)


def test_a_row_is_a_question_about_its_image(served):
    both = predict(served, base64.b64encode(RED).decode(), base64.b64encode(RED))
    assert both == bivlm.answer(served.model, served.processor, [(RED, QUESTION)]) * 2
    assert predict(served) == []


def test_the_most_tokens_of_an_answer_are_a_parameter(served):
    (long,) = predict(served, base64.b64encode(RED), params={"max_new_tokens": 8})
    assert long.startswith(predict(served, base64.b64encode(RED), params={"max_new_tokens": 1})[0])


@pytest.mark.parametrize("value", [None, 3, "???", base64.b64encode(b"no image")])
def test_the_question_whose_image_cannot_be_read_is_named(served, value):
    with pytest.raises(InputError, match="question 1, image: expected"):
        predict(served, base64.b64encode(RED), value)


@pytest.mark.parametrize("imports", EARLIER_IMPORTS)
def test_a_model_that_an_earlier_version_registered_answers_the_same(served, imports):
    names = {}
    exec(imports, names)
    with pytest.raises(names["InputError"], match=r"^row 0: expected"):
        names["decode_image"](b"no image", "row 0")
    sample = names["VqaSample"]("0", "0", names["decode_image"](RED, "row 0"), QUESTION, answers=())
    answered = names["answer_batch"](*names["load_model"](str(CHECKPOINT)), [sample], 16)
    assert answered == predict(served, base64.b64encode(RED))
