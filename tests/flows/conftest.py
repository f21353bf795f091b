"""One Prefect server and one empty MLflow database for all tests of the flow; each test has its own workspace."""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.cli.quiet import quieten

quieten()

import mlflow  # noqa: E402
from hub_server import hub  # noqa: E402, F401  fixture
from mlflow import MlflowClient  # noqa: E402
from PIL import Image  # noqa: E402
from prefect.testing.utilities import prefect_test_harness  # noqa: E402
from s3_server import s3_endpoint, s3_location  # noqa: E402, F401  fixtures

COMPONENTS = ("vision", "adaptor", "language")


@pytest.fixture(scope="session", autouse=True)
def prefect_server():
    """A Prefect server of our own; the address goes to child processes through the environment."""
    from prefect.settings import PREFECT_API_URL

    with prefect_test_harness(server_startup_timeout=300), pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFECT_API_URL", PREFECT_API_URL.value())
        yield


@pytest.fixture(scope="session")
def mlflow_database(tmp_path_factory) -> Path:
    """An empty database: making its tables takes seconds, copying the file does not."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture(scope="session")
def questions(tmp_path_factory) -> Path:
    """A benchmark of four questions about two images."""
    folder = tmp_path_factory.mktemp("questions")
    lines = []
    for number, colour in enumerate(("red", "blue")):
        Image.new("RGB", (32, 32), colour).save(folder / f"{colour}.png")
        lines.append({"image": f"{colour}.png", "question": f"Is image {number} {colour}?", "answers": ["yes"]})
        lines.append({"image": f"{colour}.png", "question": "Which colour?", "answers": [colour, f"all {colour}"]})
    (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture(scope="session")
def conversations(tmp_path_factory) -> Path:
    """Three conversations to calibrate on."""
    folder = tmp_path_factory.mktemp("conversations")
    lines = []
    for colour in ("red", "green", "blue", "yellow", "black"):
        Image.new("RGB", (32, 32), colour).save(folder / f"{colour}.png")
        lines.append({"image": f"{colour}.png", "user": "Which colour?", "assistant": colour})
    (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@dataclass
class Compression:
    """One place to compress in: a model, a workspace and an output folder."""

    model: Path
    recipe: dict[str, Any]
    place: Path
    output: Path
    results: list[dict[str, Any]] = field(default_factory=list)

    @property
    def workspace(self) -> Path:
        return self.place / "workspace"

    @property
    def client(self) -> MlflowClient:
        return MlflowClient(f"sqlite:///{self.workspace / 'mlflow.db'}")

    def run(self, **changes: Any) -> dict[str, Any]:
        from flows.compress import compress_flow

        arguments = {
            "model": str(self.model),
            "recipe": self.recipe,
            "output": str(self.output),
            "workspace": str(self.workspace),
        }
        result = compress_flow(**(arguments | changes))
        self.results.append(result)
        return result

    def arguments(self, **changes: str) -> list[str]:
        """Those of `bivlm compress` for this place, with some options changed."""
        options = {
            "model": str(self.model),
            "recipe": str(self.recipe_file()),
            "output": str(self.output),
            "workspace": str(self.workspace),
        }
        return [text for name, value in (options | changes).items() for text in (f"--{name}", value)]

    def recipe_file(self) -> Path:
        path = self.place / "recipe.yaml"
        path.write_text(yaml.safe_dump(self.recipe))
        return path

    def report(self) -> dict[str, Any]:
        return json.loads((self.output / "compression_report.json").read_text())

    def runs(self, role: str) -> list[mlflow.entities.Run]:
        experiments = [e.experiment_id for e in self.client.search_experiments()]
        return self.client.search_runs(experiments, f"tags.`bivlm.role` = '{role}'")

    def steps(self, stage: str) -> list[dict[str, Any]]:
        """The records of a stage that the workspace holds."""
        records = [json.loads(path.read_text()) for path in sorted((self.workspace / "steps").glob("*.json"))]
        return [record for record in records if record["identity"]["stage"] == stage]

    def weights(self) -> dict[str, bytes]:
        """The files of the packed checkpoint, without those that say when, where and in how long it was made."""
        about_the_run = {"compression_report.json", "lineage.json", "report.html"}
        return {path.name: path.read_bytes() for path in self.output.iterdir() if path.name not in about_the_run}


@pytest.fixture(scope="session")
def small_recipe(questions, conversations) -> dict[str, Any]:
    """Every component, a benchmark and calibration samples that take no time."""
    settings = {"method": "bivlm", "groups": 2, "p_max": 0.05}
    return {
        "name": "small",
        "format": 1,
        "components": {component: dict(settings) for component in COMPONENTS},
        "calibration": {"source": str(conversations), "samples": 3, "held_out": 2, "seed": 0},
        "evaluation": [f"vqa:{questions}"],
    }


@pytest.fixture(scope="session")
def new_compression(tiny_llava, small_recipe, mlflow_database):
    """A function that makes an empty place to compress the tiny model in."""

    def make(place: Path) -> Compression:
        compression = Compression(tiny_llava, json.loads(json.dumps(small_recipe)), place, place / "packed")
        compression.workspace.mkdir(parents=True)
        shutil.copyfile(mlflow_database, compression.workspace / "mlflow.db")
        return compression

    return make


@pytest.fixture(scope="session")
def compressed(new_compression, tmp_path_factory) -> Compression:
    """The tiny model, compressed once; look, do not touch."""
    compression = new_compression(tmp_path_factory.mktemp("compressed"))
    compression.run()
    return compression


@pytest.fixture
def compressed_copy(compressed, tmp_path) -> Compression:
    """A copy of it to go on from; what MLflow logged stays where it was."""
    place = tmp_path / "copy"
    shutil.copytree(compressed.place, place)
    return Compression(compressed.model, json.loads(json.dumps(compressed.recipe)), place, place / "packed")


@pytest.fixture
def listed(new_compression, monkeypatch, tmp_path):
    """A workspace, and one listed model with a recipe of its own."""
    compression = new_compression(tmp_path)
    model = shutil.copytree(compression.model, tmp_path / "models" / "llava")
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(compression.recipe))
    entries = [{"model": str(model), "recipes": ["small"]}]
    (tmp_path / "list.yaml").write_text(yaml.safe_dump({"format": 1, "models": entries}))
    monkeypatch.setenv("BIVLM_BASE_MODELS", str(tmp_path / "list.yaml"))
    monkeypatch.setenv("BIVLM_RECIPES", str(tmp_path))
    monkeypatch.setenv("BIVLM_OUTPUTS", str(tmp_path / "outputs"))
    monkeypatch.setenv("BIVLM_WORKSPACE", str(compression.workspace))
    return compression, str(model)


@pytest.fixture
def counted(monkeypatch):
    """How often each stage really worked, by stage and layer."""
    from bivlm.numerics.weight_statistics import LayerStatistics
    from tasks import binarization, evaluation, grouping, saliency

    calls: dict[str, list[str]] = {"statistics": [], "plan": [], "pack": [], "evaluation": [], "divergence": []}

    def counting(stage, function, name=lambda *arguments: ""):
        def wrapped(*arguments, **options):
            calls[stage].append(name(*arguments))
            return function(*arguments, **options)

        return wrapped

    class Measured(LayerStatistics):
        measure = staticmethod(counting("statistics", LayerStatistics.measure, lambda w, share, name: name))

    class Planned(LayerStatistics):
        load = staticmethod(counting("plan", LayerStatistics.load))

    # Where the stages look them up, because error curves measure and plan as well.
    monkeypatch.setattr(saliency, "LayerStatistics", Measured)
    monkeypatch.setattr(grouping, "LayerStatistics", Planned)
    pack = binarization.pack_layer
    monkeypatch.setattr(binarization, "pack_layer", counting("pack", pack, lambda w, plan, name, inputs: name))
    monkeypatch.setattr(evaluation, "evaluate", counting("evaluation", evaluation.evaluate))
    monkeypatch.setattr(evaluation, "kl_divergence", counting("divergence", evaluation.kl_divergence))
    return calls
