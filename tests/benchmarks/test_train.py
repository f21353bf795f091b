"""A killed training run resumes to the weights of one that was never killed."""

import pytest
import torch

from benchmarks.reference_model import train
from benchmarks.reference_model.architecture import TINY
from benchmarks.reference_model.sequences import Packer
from benchmarks.reference_model.train import Run, Stage, Trainee, adopt, learning_rate

SHORT = {"vision": Stage(4, 2, 0, 1e-3, 2), "joint": Stage(4, 2, 192, 1e-3, 2)}


def _run(tokenizer, name, output, *, stop_after=None):
    torch.manual_seed(0)
    run = Run(Trainee(tokenizer, TINY), name, output, SHORT[name], seed=0, hours=None)
    run.resume()
    packer = Packer(tokenizer, SHORT[name].length) if name == "joint" else None
    run.train(packer, torch.device("cpu"), save_every=1, stop_after=stop_after)
    return run.trainee.state_dict()


@pytest.mark.parametrize("name", ["vision", "joint"])
def test_a_stage_stopped_half_way_ends_with_the_same_weights(tokenizer, tmp_path, name):
    straight = _run(tokenizer, name, tmp_path / "straight")
    _run(tokenizer, name, tmp_path / "stopped", stop_after=2)
    resumed = _run(tokenizer, name, tmp_path / "stopped")
    assert all(torch.equal(straight[key], resumed[key]) for key in straight)


def test_a_kill_while_saving_leaves_the_old_state(tokenizer, tmp_path, monkeypatch):
    _run(tokenizer, "vision", tmp_path, stop_after=2)
    monkeypatch.setattr(train.Path, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        _run(tokenizer, "vision", tmp_path, stop_after=1)
    assert torch.load(tmp_path / "state" / "vision.pt", weights_only=True)["step"] == 2


def test_the_joint_stage_says_what_is_missing(tokenizer, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"vision\.pt is missing.*--stages vision"):
        adopt(Trainee(tokenizer, TINY), tmp_path)


def test_the_joint_stage_starts_from_the_tower_that_the_vision_stage_trained(tokenizer, tmp_path):
    vision = _run(tokenizer, "vision", tmp_path, stop_after=1)
    torch.manual_seed(9)
    trainee = Trainee(tokenizer, TINY)
    adopt(trainee, tmp_path)
    weights = trainee.state_dict()
    learned = [key for key in weights if key.startswith(("model.model.vision_tower.", "cells."))]
    assert learned
    assert all(torch.equal(weights[key], vision[key]) for key in learned)


def test_the_learning_rate_warms_up_and_ends_at_its_floor():
    stage = Stage(steps=100, batch=1, length=1, rate=1.0, warmup=10)
    assert learning_rate(stage, 0, 0.0) == pytest.approx(0.1)
    assert learning_rate(stage, 10, 0.0) == pytest.approx(1.0)
    assert learning_rate(stage, 100, 1.0) == pytest.approx(train.FLOOR)
