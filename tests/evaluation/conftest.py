"""A tiny model that computes in float32, and a folder of questions to change."""

import json
from pathlib import Path

import pytest
from PIL import Image

from bivlm.evaluation.generation import load_model


@pytest.fixture(scope="session")
def loaded(tiny_llava):
    """Model and processor; do not change them."""
    return load_model(tiny_llava, device="cpu", dtype="float32")


@pytest.fixture
def write_folder(tmp_path):
    """Writes `data.jsonl` (objects, or raw bytes) beside two images; returns the folder."""

    def write(*lines: dict | bytes) -> Path:
        folder = tmp_path / "questions"
        (folder / "images").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30), "red").save(folder / "images" / "red.png")
        Image.new("RGB", (40, 30), "blue").save(folder / "blue.jpg")
        rows = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
        (folder / "data.jsonl").write_bytes(b"\n".join(rows) + b"\n")
        return folder

    return write
