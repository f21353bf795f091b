"""What the README shows is run as it stands there, on the reference model and few questions."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from test_docs import ROOT, commands, fences, pages

MODEL = "bivlm/reference/checkpoint"
# Names in capitals stand for the reader's own; few questions, so that a command takes seconds.
FEW = {
    "compress": ["--questions", "8"],
    "leaderboard": ["--questions", "4"],
    "sweep": ["--questions", "4"],
    "redundancy": ["--questions", "8"],
}
NEEDS_MORE = {"trigger", "reproduce"}  # servers; published weights

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder for all that the commands make, with the README's own questions about an image."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "questions").mkdir()
    (lines,) = fences("README.md", "json")
    (folder / "questions" / "data.jsonl").write_text(lines)
    Image.new("RGB", (64, 64), (200, 0, 0)).save(folder / "questions" / "1.png")
    return folder


def run(arguments: list[str], place: Path) -> subprocess.CompletedProcess[str]:
    """A Python program in a home of its own, without servers and without a network's addresses."""
    unset = ("PREFECT_API_URL", "PREFECT_PROFILE", "MLFLOW_TRACKING_URI", "BIVLM_WORKSPACE")
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    environment |= {"HOME": str(place), "PREFECT_HOME": str(place / "prefect"), "PYTHONPATH": str(ROOT)}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": environment.get("OMP_NUM_THREADS", "1"), "COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )


def filled(words: list[str], place: Path) -> list[str]:
    names = {
        "DIR_OR_HUB_ID": MODEL,
        "DIR": MODEL,
        "OUT": str(place / "out"),
        "vqa:FOLDER": f"vqa:{place / 'questions'}",
        "TASK": "reference:choice",
        "SWEEP": str(place / "sweep"),
        "BOARD": str(place / "board"),
        "OWNER/NAME": "me/packed",
        "photo.jpg": str(place / "questions" / "1.png"),
    }
    return [names.get(word, word) for word in words]


def test_the_commands_of_the_readme_work_in_their_order(place):
    ran = []
    for words in commands("README.md"):
        if words[0].removeprefix(".venv/bin/") != "bivlm" or words[1] in NEEDS_MORE:
            continue
        few = [] if "--estimate" in words else FEW.get(words[1], [])
        done = run(["-m", "flows.cli", *filled(words[1:], place), *few], place)
        assert done.returncode == 0 and done.stdout, (shlex.join(words), done.stderr[-3000:])
        ran.append(words[1])
    assert len(ran) >= 10, ran


def test_the_example_of_loading_works(place):
    (text,) = fences("README.md", "python")
    loaded = text.replace('"OUT"', repr(str(place / "out"))) + "print(sum(p.numel() for p in model.parameters()))\n"
    done = run(["-c", loaded], place)
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout.split()[-1]) > 7_000_000


def test_the_demo_prints_the_bits_of_the_table(place):
    """Bits do not depend on the number of questions; accuracy and KL do, and were measured with all."""
    done = run(["-m", "flows.cli.demo", "--output", str(place / "demo"), "--questions", "4"], place)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = re.findall(
        r"^\| `([\w-]+)`:.*\| ([\d.]+) \| ([\d.]+) \| \*\*([\d.]+)\*\* \| ([\d.]+) \|$", pages()["README.md"], re.M
    )
    assert len(rows) == 3
    printed = {line.split()[0]: line.split() for line in done.stdout.splitlines() if line.strip()}
    for recipe, *bits in rows:
        assert printed[recipe][-6:-2] == bits
