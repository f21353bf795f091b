import os
import signal
import subprocess
import sys
import textwrap

import pytest

from bivlm.checkpoint.reading import Checkpoint
from tests.servers import PATIENCE

KILLED_AFTER = 5

# Runs the flow and kills its own process group, as a lost machine would, when the sixth layer is to be packed.
SCRIPT = textwrap.dedent("""
    import itertools, os, signal, sys
    from flows.cli.quiet import quieten
    quieten()
    from tasks import binarization
    from flows.compress import compress_flow

    calls, pack_layer = itertools.count(), binarization.pack_layer
    def deadly(*arguments):
        if next(calls) == int(sys.argv[5]):
            os.killpg(0, signal.SIGKILL)
        return pack_layer(*arguments)
    binarization.pack_layer = deadly
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


@pytest.mark.parametrize("recipe", [{}, pytest.param(TRELLIS, marks=pytest.mark.slow)], ids=["small", "trellis"])
def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(new_compression, left_in_peace, tmp_path, counted, recipe):
    compression = new_compression(tmp_path)
    compression.recipe |= recipe
    arguments = (compression.model, compression.recipe_file(), compression.output, compression.workspace, KILLED_AFTER)
    killed = subprocess.run(
        [sys.executable, "-c", SCRIPT, *map(str, arguments)], start_new_session=True, timeout=PATIENCE, env=os.environ
    )
    assert killed.returncode == -signal.SIGKILL
    assert not compression.output.exists()
    finished = len(compression.steps("pack"))
    assert finished >= 1

    compression.run(evaluate=False)

    layers = len(Checkpoint.open(compression.output).packed)
    assert counted["statistics"] == counted["plan"] == []
    assert len(counted["pack"]) == layers - finished
    assert compression.weights() == left_in_peace.weights()
    (parent,) = compression.runs("compression")
    assert parent.info.status == "FINISHED"
