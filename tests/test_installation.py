"""The wheel in empty environments: a light core that runs packed checkpoints, and the pipeline as an extra."""

import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from benchmarks.core_size import build_wheel, install, installed
from bivlm.numerics.trellis import FREE_STATE_BITS, RATES

ROOT = Path(__file__).parents[1]
HEAVY = {"boto3", "datasets", "fastapi", "matplotlib", "mlflow", "pandas", "prefect", "psutil", "pyarrow", "sqlalchemy"}
ANSWER = """
import sys, bivlm
from bivlm.reference import CHECKPOINT, questions
bivlm.compress_model(CHECKPOINT, "bivlm", "packed")
from transformers import AutoModelForImageTextToText, AutoProcessor
model, processor = AutoModelForImageTextToText.from_pretrained("packed"), AutoProcessor.from_pretrained("packed")
sample = next(iter(questions("perception")))
turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": sample.question}]}]
text = processor.apply_chat_template(turn, add_generation_prompt=True)
inputs = processor(text=text, images=sample.image, return_tensors="pt").to(dtype=model.dtype)
answer = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs["input_ids"].shape[1] :]
print(processor.decode(answer, skip_special_tokens=True).strip() in sample.answers)
"""


# A layer packed and rebuilt, and whether by native code.
PACKED = """
import hashlib, torch
from bivlm import kernels
from bivlm.compression.layer import pack_layer
from bivlm.methods import method
from bivlm.numerics.input_statistics import SiteStatistics
from bivlm.numerics.weight_statistics import LayerStatistics
from bivlm.packing import unpack
x, weight = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) for shape in ((200, 40), (24, 40)))
inputs = SiteStatistics(x.T @ x / 200, x.mean(0), x.abs().mean(0), {"text": 200}, gradient_moment_MM=torch.eye(24))
chosen = method("trellis")
settings = chosen.Settings(method="trellis", rate=1.25, feedback="both")
packed, _ = pack_layer(weight, chosen.plan(LayerStatistics.measure(weight, 0.0), settings), inputs=inputs)
digests = [hashlib.sha256(each.numpy().tobytes()).hexdigest() for each in (packed, unpack(packed))]
print(kernels.native() is not None, *digests)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def wheel_without_compiler(tmp_path_factory):
    """A wheel built where there is none that works."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CC", "/bin/false")
        return build_wheel(tmp_path_factory.mktemp("wheel"))


def names_in(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def run(folder: Path, *command: str | Path) -> subprocess.CompletedProcess[str]:
    own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(list(map(str, command)), cwd=folder, env=own, capture_output=True, text=True, check=False)


def test_the_pipeline_is_an_extra_that_every_other_one_but_an_exports_brings():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

    def names(requirements):
        return {requirement.partition(">")[0].partition("<")[0] for requirement in requirements}

    assert names(project["optional-dependencies"]["pipeline"]) == HEAVY
    assert not names(project["dependencies"]) & HEAVY
    for extra, requirements in project["optional-dependencies"].items():
        alone = extra in ("pipeline", "gguf")  # an export needs the core alone
        assert alone != any("pipeline" in each for each in requirements), extra


@pytest.mark.parametrize(
    "arguments",
    [
        ["compress", "--model", "m", "--recipe", "bivlm", "--output", "o"],
        ["gc"],
        ["audit", "name/1"],
        ["trigger", "--model", "m"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_command_says_what_to_install(arguments, tmp_path):
    """Where two modules are missing, as in an installation of the core."""
    hidden = "import sys; sys.modules |= {'prefect': None, 'mlflow': None}"
    code = f"{hidden}; from flows.cli.main import main; sys.exit(main())"
    own = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, cwd=tmp_path, env=own, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    (said,) = done.stderr.splitlines()
    assert said.startswith(f"bivlm {arguments[0]}: needs ")
    assert said.endswith(", which is not installed; pip install 'bivlm[pipeline]'")


@pytest.mark.slow
def test_native_code_is_in_the_wheel_where_it_could_be_built(wheel, wheel_without_compiler):
    (native,) = [name for name in names_in(wheel) if name.startswith("bivlm/kernels/_native.")]
    assert native.endswith(".so")
    assert set(names_in(wheel)) - set(names_in(wheel_without_compiler)) >= {native}
    assert not [name for name in names_in(wheel_without_compiler) if "_native." in name]
    for each in (wheel, wheel_without_compiler):
        codes = [name for name in names_in(each) if name.startswith("bivlm/numerics/trellis_codes/")]
        assert len(codes) == len(RATES) * len(FREE_STATE_BITS)
        assert "bivlm/numerics/trellis_windows.json" in names_in(each)


@pytest.mark.slow
def test_an_installation_without_a_compiler_packs_the_same_bytes(wheel, wheel_without_compiler, tmp_path):
    """Both wheels unpacked beside the packages of this environment: what differs is the native code alone."""
    said = []
    for each in (wheel, wheel_without_compiler):
        folder = tmp_path / each.parent.name
        with zipfile.ZipFile(each) as archive:
            archive.extractall(folder)
        code = f"import sys; sys.path.insert(0, {str(folder)!r}); import bivlm; print(bivlm.__file__)" + PACKED
        done = run(tmp_path, sys.executable, "-c", code)
        assert done.returncode == 0, done.stderr
        place, last = done.stdout.splitlines()
        assert Path(place).is_relative_to(folder)
        said.append(last.split())
    assert [native for native, *_ in said] == ["True", "False"]
    assert said[0][1:] == said[1][1:]


@pytest.mark.slow
def test_a_core_installation_packs_a_model_and_answers_a_question(wheel, tmp_path, capsys):
    python = install(wheel, tmp_path / "core")
    core = installed(python)
    with capsys.disabled():
        print(f"\nbivlm: {core}")
    assert not core.packages & HEAVY
    done = run(tmp_path, python, "-c", ANSWER)
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr
    bivlm = python.with_name("bivlm")
    assert run(tmp_path, bivlm, "bits", "packed").returncode == 0
    done = run(tmp_path, bivlm, "compress", "--model", "packed", "--recipe", "bivlm", "--output", "out")
    said = "bivlm compress: needs prefect, which is not installed; pip install 'bivlm[pipeline]'\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", said)


@pytest.mark.slow
def test_the_pipeline_brings_the_rest(wheel, tmp_path, capsys):
    python = install(wheel, tmp_path / "pipeline", "pipeline")
    found = installed(python)
    with capsys.disabled():
        print(f"\nbivlm[pipeline]: {found}")
    assert found.packages >= HEAVY
    done = run(
        tmp_path, python.with_name("bivlm"), "compress", "--model", "nothing", "--recipe", "bivlm", "--output", "o"
    )
    assert done.returncode == 2 and "nothing" in done.stderr and "pip install" not in done.stderr
