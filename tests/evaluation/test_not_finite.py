"""A model that gives NaN or infinity fails by name, wherever its numbers would become answers or figures."""

import copy
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from published_data import write_set
from safetensors.torch import load_file, save_file

from bivlm.checkpoint.reading import Checkpoint
from bivlm.evaluation.benchmark import load_benchmark
from bivlm.evaluation.divergence import kl_divergence, reference_logits
from bivlm.evaluation.generation import answer_batch, load_model
from bivlm.evaluation.outcomes import evaluate
from bivlm.numerics.logits import LogitsWatch, unusable
from bivlm.pruning.dropping import pruned
from bivlm.recipe.pruning import PruningSettings
from bivlm.sources.samples import CalibrationSample
from flows.cli import main as cli
from tests.evaluation.test_generation import _samples

HEAD = "lm_head.weight"
LATE = "layers.1.mlp.down_proj.weight"
TOWER = "encoder.layers.1.mlp.fc2.weight"
CASES = [(HEAD, "nan"), (HEAD, "inf"), (LATE, "nan"), (LATE, "inf"), (LATE, "-inf"), (TOWER, "nan"), (TOWER, "inf")]


def broken(folder: Path, target: Path, name: str, value: str) -> Path:
    """A copy of a checkpoint with one weight of the tensor whose name ends in `name` replaced."""
    shutil.copytree(folder, target)
    tensors = load_file(target / "model.safetensors")
    found = next(key for key in tensors if key.endswith(name))
    tensors[found].view(-1)[3] = float(value)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.fixture
def task(tmp_path):
    return f"mme:{write_set('mme', tmp_path / 'set')}"


@pytest.mark.parametrize(("name", "value"), CASES)
def test_full_precision_fails_by_name(tiny_llava, tmp_path, task, name, value):
    folder = broken(tiny_llava, tmp_path / "broken", name, value)
    model, processor = load_model(folder, "cpu")
    with pytest.raises(ArithmeticError, match=rf"^model {folder}: gives NaN or infinity"):
        evaluate(model, processor, load_benchmark(task))


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_packed_model_fails_by_name(packed_llava, tmp_path, task, value):
    folder = broken(packed_llava, tmp_path / "broken", HEAD, value)
    with pytest.raises(ArithmeticError, match=rf"^model {folder}: gives NaN or infinity"):
        evaluate(*load_model(folder, "cpu"), load_benchmark(task))


@pytest.mark.parametrize("against", [False, True])
def test_the_command_ends_with_1_and_a_sentence(tiny_llava, tmp_path, task, capsys, monkeypatch, against):
    monkeypatch.setenv("BIVLM_CACHE", str(tmp_path / "cache"))
    folder = broken(tiny_llava, tmp_path / "broken", LATE, "nan")
    models = ["--model", str(tiny_llava), "--against", str(folder)] if against else ["--model", str(folder)]
    assert cli.main(["evaluate", *models, "--task", task]) == cli.FAILED
    said = capsys.readouterr()
    assert said.err.strip().endswith(
        f"bivlm evaluate: failed: ArithmeticError: model {folder}: gives NaN or infinity: logits of an answer; "
        "expected finite numbers"
    )
    assert "Traceback" not in said.err + said.out
    assert not list((tmp_path / "cache").rglob(f"{folder.name}*.parquet"))


def test_one_bad_question_of_a_batch_is_enough(loaded):
    """The second of three answers, at its second token, with padding before it."""
    model, processor = loaded
    spoiled, calls = copy.deepcopy(model), []

    def spoil(_module, _arguments, logits):
        calls.append(len(logits))
        if len(calls) == 2:
            logits[1, -1, 5] = float("nan")

    spoiled.lm_head.register_forward_hook(spoil)
    with pytest.raises(ArithmeticError, match="gives NaN or infinity"):
        answer_batch(spoiled, processor, _samples(3), 4)
    assert len(calls) == 4
    calls.clear()
    assert answer_batch(model, processor, _samples(3), 4)


def test_logits_are_unusable_where_they_have_no_probabilities():
    finite = torch.tensor([[0.0, 3e38], [-3e38, 1.0]])
    masked = torch.tensor([[0.0, -torch.inf], [-torch.inf, 1.0]])
    assert not unusable(finite) and not unusable(masked) and not unusable(masked[None])
    for row in ([torch.nan, 0.0], [torch.inf, 0.0], [-torch.inf, -torch.inf], [torch.nan, torch.inf]):
        assert unusable(torch.tensor([[0.0, 1.0], row]))
    model, watch = SimpleNamespace(name_or_path="OUT"), LogitsWatch()
    watch.check(model)
    for scores in (finite, torch.tensor([[torch.nan, 1.0]]), finite):
        assert watch(torch.zeros(1, 1), scores) is scores
    with pytest.raises(ArithmeticError, match="model OUT"):
        watch.check(model)


@pytest.mark.parametrize(("name", "value"), [(LATE, "nan"), (HEAD, "inf")])
def test_the_divergence_names_the_model(tiny_llava, tmp_path, name, value):
    folder = broken(tiny_llava, tmp_path / "broken", name, value)
    samples = [CalibrationSample(sample.image, sample.question, "yes") for sample in _samples(2)]
    stored = reference_logits(*load_model(tiny_llava, "cpu"), samples, tmp_path / "full")
    model, processor = load_model(folder, "cpu")
    for compute in (
        lambda: reference_logits(model, processor, samples, tmp_path / "other"),
        lambda: kl_divergence(model, processor, samples, stored),
    ):
        with pytest.raises(ArithmeticError, match=rf"^model {folder}: gives NaN or infinity: logits on a sample"):
            compute()


@pytest.mark.parametrize("name", [HEAD, LATE, TOWER])
@pytest.mark.parametrize(
    "settings",
    [
        {"place": "vision", "score": "attention", "layer": 1, "share": 0.5},
        {"place": "vision", "score": "uniform", "layer": 1, "share": 0.0},
        {"place": "input", "score": "divprune", "share": 0.5},
        {"place": "language", "score": "attention", "layer": 1, "share": 0.5},
    ],
)
def test_a_model_that_drops_tokens_fails_by_name_too(tiny_llava, tmp_path, name, settings):
    folder = broken(tiny_llava, tmp_path / "broken", name, "nan")
    model, processor = load_model(folder, "cpu")
    with (
        pruned(model, PruningSettings.model_validate(settings), Checkpoint.open(folder).modules),
        pytest.raises(ArithmeticError, match=rf"^model {folder}: gives NaN or infinity"),
    ):
        answer_batch(model, processor, _samples(2), 2)
