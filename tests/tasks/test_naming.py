from pathlib import Path

import pytest

from bivlm.sources.models import ResolvedModel
from tasks.runtime.naming import model_name, registered_name, slug


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (ResolvedModel(Path("/cache/snapshots/abc"), "llava-hf/llava-1.5-7b-hf", "abc"), "llava-hf-llava-1-5-7b-hf"),
        (ResolvedModel(Path("/models/my llava.v2"), "/models/my llava.v2", None), "my-llava-v2"),
        (
            ResolvedModel(Path("/bivlm/reference/checkpoint"), "/bivlm/reference/checkpoint", None),
            "reference-checkpoint",
        ),
    ],
)
def test_a_model_is_called_what_its_user_calls_it(model, name):
    assert model_name(model) == name


def test_a_folder_has_its_own_name_however_it_was_written(tmp_path, monkeypatch):
    (tmp_path / "llava").mkdir()
    monkeypatch.chdir(tmp_path / "llava")
    assert model_name(ResolvedModel(Path(), ".", None)) == "llava"


def test_recipes_of_one_model_have_registered_models_of_their_own():
    model = ResolvedModel(Path("/models/llava"), "/models/llava", None)
    assert registered_name(model, "bivlm") != registered_name(model, "bivlm-1bit")


def test_a_slug_has_no_characters_that_mlflow_refuses():
    assert slug("vqa:/data/my set") == "vqa.data.my.set"
    assert slug("color/acc", keep="/") == "color/acc"
