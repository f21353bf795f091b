"""`bivlm evaluate` on the published sets: the score, where its questions are from, the loss on the same questions."""

import json

import pytest
from published_data import write_set

from bivlm.evaluation.outcomes import read_outcomes
from bivlm.evaluation.paired import loss_between
from flows.cli import main as cli


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BIVLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")


def test_two_checkpoints_are_compared_on_the_same_questions(tiny_llava, packed_llava, tmp_path, capsys):
    task = f"mme:{write_set('mme', tmp_path)}"
    arguments = ["evaluate", "--model", str(packed_llava), "--against", str(tiny_llava), "--task", task]
    assert cli.main([*arguments, "--batch-size", "2", "--json"]) == cli.DONE
    record = json.loads(capsys.readouterr().out)
    assert record["source"] == {"data_set": str(tmp_path), "revision": None, "subset": "default", "split": "test"}
    assert set(record["intervals"]) == {"perception", "cognition"}
    before, after = read_outcomes(record["against"]["outcomes"]), read_outcomes(record["outcomes"])
    assert record["loss"] == vars(loss_between(before, after))
    assert record["loss"]["n"] == 6
    assert cli.main(arguments) == cli.DONE
    printed = capsys.readouterr().out
    assert "perception, 95 % interval" in printed
    assert "loss on the same questions" in printed
    assert f"questions: {tmp_path}, test, revision of the folder" in printed


def test_a_model_at_chance_is_named_beside_what_was_lost_against_it(tiny_llava, packed_llava, tmp_path, capsys):
    """The random model says neither yes nor no."""
    task = f"mme:{write_set('mme', tmp_path)}"
    arguments = ["evaluate", "--model", str(packed_llava), "--against", str(tiny_llava), "--task", task]
    assert cli.main([*arguments, "--json"]) == cli.DONE
    record = json.loads(capsys.readouterr().out)
    assert record["chance"] == 50.0
    (found,) = record["at_chance"]
    assert (found["task"], found["n"], found["chance"], found["model"]) == (task, 6, 50.0, str(tiny_llava))
    assert found["accuracy"] == record["against"]["metrics"]["accuracy"]
    assert cli.main(arguments) == cli.DONE
    printed = capsys.readouterr().out
    assert f"warning: {task}: {tiny_llava} scores" in printed and "50.00" in printed
    alone = ["evaluate", "--model", str(packed_llava), "--task", task]
    assert cli.main(alone) == cli.DONE
    assert "warning" not in capsys.readouterr().out


def test_a_terminal_sees_how_many_questions_are_answered(tiny_llava, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # what rich takes for a terminal
    monkeypatch.setenv("TERM", "xterm")
    task = f"scienceqa:{write_set('scienceqa', tmp_path)}"
    assert cli.main(["evaluate", "--model", str(tiny_llava), "--task", task, "--json"]) == cli.DONE
    shown = capsys.readouterr()
    assert f"{tiny_llava.name} on {task}" in shown.err
    assert "2/2" in shown.err
    assert json.loads(shown.out)["n"] == 2


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--batch-size", "0"], "batch size: found 0, expected 1 or more"),
        (["--against", "nowhere"], "checkpoint nowhere: no such folder"),
        (["--task", "mme:nowhere"], "mme:nowhere: no such folder, and not of the form hub"),
    ],
)
def test_what_can_be_mended_is_told_in_a_line(tiny_llava, tmp_path, capsys, more, message):
    task = f"vizwiz:{write_set('vizwiz', tmp_path)}"
    assert cli.main(["evaluate", "--model", str(tiny_llava), "--task", task, *more]) == cli.BAD_INPUT
    assert message in capsys.readouterr().err
