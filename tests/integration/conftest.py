"""The real servers, once for all integration tests; the folder of each is one that PostgreSQL's user can enter."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tiny_llava import make_tiny_llava

from infra.stack import Servers
from tests.integration.platform_processes import Api

COMPONENTS = ("vision", "adaptor", "language")


def stack_folder() -> Path:
    """A new folder that everybody may enter, unlike those of pytest."""
    folder = Path(tempfile.mkdtemp(prefix="bivlm-stack-"))
    folder.chmod(0o711)
    return folder


@pytest.fixture(scope="session")
def stack() -> Iterator[Servers]:
    """PostgreSQL, S3, MLflow and Prefect; whoever kills one starts it again."""
    servers = Servers(stack_folder())
    try:
        yield servers.start()
    finally:
        servers.stop()
        shutil.rmtree(servers.folder)


@pytest.fixture
def second_stack() -> Iterator[Servers]:
    """An empty one, not started, to be used up."""
    servers = Servers(stack_folder())
    try:
        yield servers
    finally:
        servers.stop()
        shutil.rmtree(servers.folder)


@pytest.fixture
def show(capsys) -> Callable[[str], None]:
    """Prints a figure on the terminal, also that of a test that passes."""

    def printed(figure: str) -> None:
        with capsys.disabled():
            print(f"\n{figure}")

    return printed


@pytest.fixture(scope="session")
def home(tmp_path_factory) -> Path:
    """Where workers and clients of the session keep what is theirs."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="session")
def api(stack, home) -> Api:
    """The servers with pools, deployments and automations."""
    api = Api(stack, home / "client")
    api.deploy_all()
    return api


@pytest.fixture(scope="session")
def request_of(tmp_path_factory) -> Callable[..., dict[str, Any]]:
    """Parameters of compress/compress for a tiny model, by name: a recipe, a workspace and an output of their own."""
    place = tmp_path_factory.mktemp("material")
    model = make_tiny_llava(place / "llava")
    questions, conversations = ask_about_colours(place / "questions"), talk_about_colours(place / "conversations")

    def make(name: str, **changes: Any) -> dict[str, Any]:
        recipe = {
            "name": name,
            "format": 1,
            "components": {part: {"method": "bivlm", "groups": 2, "p_max": 0.05} for part in COMPONENTS},
            "calibration": {"source": str(conversations), "samples": 3, "held_out": 2, "seed": 0},
            "evaluation": [f"vqa:{questions}"],
        }
        workspace = f"s3://bivlm/{name}"
        return {"model": str(model), "recipe": recipe, "output": str(place / name), "workspace": workspace} | changes

    return make


def ask_about_colours(folder: Path) -> Path:
    """A benchmark of four questions about two images."""
    lines = []
    for colour in ("red", "blue"):
        image = paint(folder, colour)
        lines.append({"image": image, "question": f"Is it {colour}?", "answers": ["yes"]})
        lines.append({"image": image, "question": "Which colour?", "answers": [colour]})
    return write_lines(folder, lines)


def talk_about_colours(folder: Path) -> Path:
    """Five conversations to calibrate on."""
    colours = ("red", "green", "blue", "yellow", "black")
    lines = [{"image": paint(folder, colour), "user": "Which colour?", "assistant": colour} for colour in colours]
    return write_lines(folder, lines)


def paint(folder: Path, colour: str) -> str:
    folder.mkdir(exist_ok=True)
    Image.new("RGB", (32, 32), colour).save(folder / f"{colour}.png")
    return f"{colour}.png"


def write_lines(folder: Path, lines: list[dict[str, Any]]) -> Path:
    (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder
