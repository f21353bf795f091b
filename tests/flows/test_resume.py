import os
import signal
import subprocess
import sys
import textwrap

import pytest

from bivlm.checkpoint.reading import Checkpoint
from tests.servers import PATIENCE

KILLED_AFTER = 5

# Runs the flow and kills its own process group, as a lost machine would, when a function of `tasks` is called for the
# so manieth time.
SCRIPT = textwrap.dedent("""
    import importlib, itertools, os, signal, sys
    from flows.cli.quiet import quieten
    quieten()
    from flows.compress import compress_flow

    module, name = sys.argv[6].split(".")
    module = importlib.import_module(f"tasks.{module}")
    calls, function = itertools.count(), getattr(module, name)
    def deadly(*arguments, **options):
        if next(calls) == int(sys.argv[5]):
            os.killpg(0, signal.SIGKILL)
        return function(*arguments, **options)
    setattr(module, name, deadly)
    compress_flow(model=sys.argv[1], recipe=sys.argv[2], output=sys.argv[3], workspace=sys.argv[4])
""")


TRELLIS = {
    "name": "trellis",
    "components": {key: {"method": "trellis", "feedback": "both"} for key in ("vision", "adaptor", "language")},
    "budget": {"bits": 2.3, "importance": "curvature", "least": 1.6},
}


@pytest.fixture
def left_in_peace(new_compression, compressed, tmp_path, recipe):
    """A compression by the recipe that nobody killed."""
    if not recipe:
        return compressed
    peace = new_compression(tmp_path / "peace")
    peace.recipe |= recipe
    peace.run(evaluate=False)
    return peace


def kill(compression, function, after=0):
    """Run the compression until `function` was called `after` times; there is no output then."""
    arguments = (compression.model, compression.recipe_file(), compression.output, compression.workspace)
    killed = subprocess.run(
        [sys.executable, "-c", SCRIPT, *map(str, arguments), str(after), function],
        start_new_session=True,
        timeout=PATIENCE,
        env=os.environ,
    )
    assert killed.returncode == -signal.SIGKILL
    assert not compression.output.exists()


@pytest.mark.parametrize("recipe", [{}, pytest.param(TRELLIS, marks=pytest.mark.slow)], ids=["small", "trellis"])
def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(new_compression, left_in_peace, tmp_path, counted, recipe):
    compression = new_compression(tmp_path)
    compression.recipe |= recipe
    kill(compression, "binarization.pack_layer", KILLED_AFTER)
    finished = len(compression.steps("pack"))
    assert finished >= 1

    compression.run(evaluate=False)

    layers = len(Checkpoint.open(compression.output).packed)
    assert counted["statistics"] == counted["plan"] == []
    assert len(counted["pack"]) == layers - finished
    assert compression.weights() == left_in_peace.weights()
    (parent,) = compression.runs("compression")
    assert parent.info.status == "FINISHED"


@pytest.mark.slow
def test_killed_while_leftovers_are_tuned_or_written_it_ends_with_the_same_bytes(new_compression, tmp_path):
    tuned = {"name": "leftovers", "finish": {"steps": 6, "batch": 3, "leftovers": True}, "evaluation": []}
    compression, other = new_compression(tmp_path / "killed"), new_compression(tmp_path / "left in peace")
    compression.recipe |= tuned
    other.recipe |= tuned
    for function in ("finishing.write_tensors", "checkpoint.write_packed_checkpoint"):
        kill(compression, function)
    (before,) = compression.steps("finish")
    compression.run()
    other.run()
    assert compression.steps("finish") == [before]
    assert before["figures"]["leftovers"]
    assert compression.weights() == other.weights()
