"""Names from outside neither leave the folder they belong to nor reach a shell."""

from __future__ import annotations

import ast
import json
import re
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bivlm.checkpoint.reading import WEIGHTS, WEIGHTS_INDEX, Checkpoint
from bivlm.checkpoint.writing import write_packed_checkpoint
from bivlm.errors import InputError
from bivlm.names import check_revision, is_sha256
from bivlm.recipe.loading import parse_recipe
from bivlm.sources.hub_datasets import commit_of
from bivlm.sources.hub_download import LargeFile, download_large
from bivlm.sources.models import cached_model, resolve_model
from bivlm.untrusted import _Loader
from bivlm.workspace.steps import Workspace
from bivlm.workspace.stores.opening import open_store
from tasks.tracking.registry import is_version

ROOT = Path(__file__).parents[1]
# What makes a path leave its folder, an address another one, an argument an option, or a line two.
VISIBLE = r".. . / // \ C: ~ - %2e%2e $(id) `id` ; a main x.safetensors"
PIECES = [*VISIBLE.split(), "\0", "\n", " "]
NASTY = st.lists(st.sampled_from(PIECES), min_size=1, max_size=6).map("".join) | st.text(max_size=20)
FUNCTION_FIXTURES = [HealthCheck.function_scoped_fixture]


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """The hub switched off, and its empty cache."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@settings(max_examples=300, deadline=None, suppress_health_check=FUNCTION_FIXTURES)
@given(file=NASTY)
def test_an_index_names_files_of_its_own_folder_or_is_refused(tmp_path_factory, file):
    place = tmp_path_factory.getbasetemp() / "indexed"
    folder = place / "inside" / "model"
    folder.mkdir(parents=True, exist_ok=True)
    for outside in (place, place / "inside"):
        for name in ("a", "main", "x.safetensors"):
            (outside / name).write_bytes(b"secret")
    (folder / "config.json").write_text("{}")
    (folder / WEIGHTS_INDEX).write_text(json.dumps({"weight_map": {"tensor": file}}))
    with pytest.raises(InputError) as refused:
        Checkpoint.open(folder)
    # A file that is looked for lies inside; whatever lies outside was not even opened.
    said = str(refused.value)
    opened = "the file is missing" in said or "not a safetensors file" in said
    assert not (opened and not Path(said.partition(": ")[0]).resolve().is_relative_to(folder.resolve()))


@settings(max_examples=300, deadline=None)
@given(revision=NASTY)
def test_a_revision_is_a_name_below_its_folder_or_is_refused(revision):
    try:
        check_revision(revision, "model 'a/b'")
    except InputError as refused:
        assert repr(revision) in str(refused)
        return
    place = Path("/cache/refs")
    assert (place / revision).resolve().is_relative_to(place) and (place / revision).resolve() != place
    assert revision.isprintable() and not set(revision) & set(" ~^:?*[\\%#$`;&|<>\"'")


@pytest.mark.parametrize("revision", ["main", "v1.0", "refs/pr/12", "refs/convert/parquet", "feature/x_y-z", "0" * 40])
def test_revisions_as_people_have_them_are_taken(revision):
    assert check_revision(revision, "x") == revision


PATHS = "../../etc/passwd a/../b a/.. ../b a/b/c -x/y a/b;id $(id)/x a--b/.. ~/x // /"


@pytest.mark.parametrize("model", ["a\n/b", *PATHS.split()])
def test_a_model_id_that_is_a_path_is_refused_before_the_hub_is_asked(hub_cache, model):
    if Path(model).is_dir():  # "/": a folder, and no checkpoint
        with pytest.raises(InputError, match=r"config\.json"):
            Checkpoint.open(resolve_model(model).folder)
        return
    with pytest.raises(InputError, match="no such folder"):
        resolve_model(model)
    assert not hub_cache.exists()


@pytest.mark.parametrize("revision", ["../../../secret", "/etc/passwd", "a//b", "..", "--upload-pack=id", "a b", ""])
def test_a_revision_that_is_a_path_is_refused_before_a_file_is_read(hub_cache, revision, tmp_path):
    (tmp_path / "secret").write_text("0" * 40)
    (hub_cache / "models--a--b" / "refs").mkdir(parents=True)
    with pytest.raises(InputError, match="revision"):
        resolve_model("a/b", revision)
    with pytest.raises(InputError, match="revision"):
        commit_of("a/b", revision, key="calibration.source", prefix="hf:")


def test_a_commit_in_the_cache_that_is_a_path_is_refused(hub_cache, tiny_llava, tmp_path):
    repository = hub_cache / "models--a--b"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("../../../llava")
    shutil.copytree(tiny_llava, tmp_path / "llava")
    with pytest.raises(InputError, match=r"at commit '../../../llava'; expected 40 hex digits"):
        resolve_model("a/b", "main")
    assert cached_model("a/b", "../../../llava") is None


@pytest.mark.parametrize("sha256", ["../../outside", "/tmp/outside", "A" * 64, ""])
def test_a_file_of_the_hub_whose_hash_is_a_path_is_refused(hub_cache, sha256):
    with pytest.raises(InputError, match="expected 64 hex digits"):
        download_large("a/b", "0" * 40, [LargeFile("model.safetensors", 10, sha256)])
    assert not hub_cache.exists()


@pytest.mark.parametrize(
    "name", ["config.json", WEIGHTS, "tokenizer.json", "LICENSE", "additional_chat_templates/a.jinja"]
)
def test_a_link_out_of_the_folder_is_refused_whatever_it_is(tiny_llava, tmp_path, name):
    """Its bytes would be copied into the packed checkpoint, and from there into registries and hubs."""
    folder = shutil.copytree(tiny_llava, tmp_path / "llava")
    secret = tmp_path / "credentials"
    file = folder / name
    if file.exists():
        shutil.move(file, secret)
    else:
        secret.write_text("aws_secret_access_key")
    file.parent.mkdir(exist_ok=True)
    file.symlink_to(secret)
    with pytest.raises(InputError, match=rf"{file.name}: a link to .*credentials, outside the folder"):
        Checkpoint.open(folder)


def test_links_within_the_folder_and_to_the_folder_are_taken(tiny_llava, tmp_path):
    folder = shutil.copytree(tiny_llava, tmp_path / "llava")
    (folder / "data").mkdir()
    shutil.move(folder / WEIGHTS, folder / "data" / "weights")
    (folder / WEIGHTS).symlink_to("data/weights")
    (tmp_path / "link").symlink_to(folder)
    assert Checkpoint.open(tmp_path / "link").digest() == Checkpoint.open(tiny_llava).digest()


@settings(max_examples=200, deadline=None)
@given(name=NASTY)
def test_a_name_of_a_recipe_is_one_part_of_a_path_or_is_refused(name):
    data = {"name": name, "format": 1, "components": {"language": {"method": "rtn", "bits": 2, "group_size": 64}}}
    try:
        found = parse_recipe(data).name
    except InputError:
        return
    assert (Path("/outputs") / found).resolve().parent == Path("/outputs")
    assert found == name and name.isprintable() and not name.startswith(("-", "."))


@settings(max_examples=200, deadline=None, suppress_health_check=FUNCTION_FIXTURES)
@given(key=NASTY)
def test_a_key_of_a_step_that_is_no_hash_is_no_step(tmp_path_factory, key):
    place = Workspace.open(tmp_path_factory.getbasetemp() / "keys")
    assert not is_sha256(key)
    assert place.step(key) is None and place.record(key) is None


@pytest.mark.parametrize("name", ["../out", "/tmp/out", "a/../../out", "..", "a\\..\\..\\out"])
def test_an_output_of_a_step_stays_in_its_folder(tmp_path, name):
    place = Workspace.open(tmp_path / "work")
    reference = place.put_bytes(b"x")
    if "\\" in name:  # one part of a path here
        place.fetch_folder({name: reference}, tmp_path / "folder")
    else:
        with pytest.raises((InputError, OSError)):
            place.fetch_folder({name: reference}, tmp_path / "folder")
    assert sorted(path.name for path in tmp_path.iterdir()) in (["folder", "work"], ["work"])


@pytest.mark.parametrize("name", ["../x", "/tmp/x", "a/b", ".."])
def test_an_extra_file_of_a_packed_checkpoint_stays_in_it(tiny_llava, tmp_path, name):
    with pytest.raises(InputError, match="plain file name"):
        write_packed_checkpoint(Checkpoint.open(tiny_llava), {}, [], tmp_path / "out" / "packed", {}, {name: b"x"})
    assert not (tmp_path / "out" / "packed").exists() and not (tmp_path / "x").exists()


PREFIXES = "s3://bucket/../other s3://bucket/a/./b s3://bucket/a//b s3://../etc s3:///etc s3://B"


@pytest.mark.parametrize("url", ["s3://bucket/a\nb", *PREFIXES.split()])
def test_a_prefix_in_s3_that_is_a_path_elsewhere_is_refused(url):
    with pytest.raises(InputError, match="not an S3 location"):
        open_store(url)


@pytest.mark.parametrize("url", ["s3://key:s3cr3t@bucket/work", "s3://key:s3cr3t@bucket", "ftp://me:s3cr3t@host/x"])
def test_credentials_in_the_address_of_a_workspace_are_not_repeated(url):
    with pytest.raises(InputError) as refused:
        open_store(url)
    assert "s3cr3t" not in str(refused.value)


@pytest.mark.parametrize(
    "text", ["a/../b/1", "a/1/..", "a@b@c", "a/1;id", "models:/a/b/1", "a/99999999999999999999", "a/١"]
)
def test_what_is_no_version_in_the_registry_is_not_asked_for(text):
    assert not is_version(text)


# Modules whose readers run what they read.
PICKLES = {"pickle", "_pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
# What starts programs or reads such things, by its whole name, whatever a module calls it.
NOT_USED = re.compile(
    r"""subprocess\.(?!(CalledProcessError|CompletedProcess|DEVNULL|PIPE|STDOUT|SubprocessError|TimeoutExpired)$)\S+
    |os\.(system|popen|startfile|exec\w+|spawn\w+|posix_spawn\w*)|pty\.spawn|psutil\.Popen
    |asyncio\.(subprocess\..+|create_subprocess_\w+)
    |yaml\.(load|load_all|full_load\w*|unsafe_load\w*|Loader|FullLoader|UnsafeLoader)|yaml\.loader\..+
    |.*\bread_pickle|(os|yaml|torch)\.\*""",
    re.VERBOSE,
)
CODE = {"eval", "exec", "compile", "__import__"}
# What is there all the same: the whole of it.
ALLOWED = {
    "environment.py: subprocess.run(['git', '-C', str(_ROOT), *arguments], capture_output=True, text=True, timeout=10)",
    "untrusted.py: yaml.load(text, _Loader)",
}


def dangerous(source: str) -> set[str]:
    """What in a module could start a program, or run what came from outside."""
    tree = ast.parse(source)
    known = imported(tree)
    called = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            if any(name.partition(".")[0] in PICKLES or NOT_USED.fullmatch(name) for name in names_in(node)):
                found.add(ast.unparse(node))
        elif isinstance(node, ast.Attribute | ast.Name):
            name, call = whole_name(node, known), called.get(id(node))
            said = ast.unparse(call or node)
            options = {option.arg: ast.unparse(option.value) for option in call.keywords} if call else {}
            if NOT_USED.fullmatch(name) or (call and name in CODE):
                found.add(said)
            if name == "torch.load" and options.get("weights_only") != "True":
                found.add(said)
            if any(options.get(name, "False") != "False" for name in ("shell", "allow_pickle")):
                found.add(said)
            if options.get("trust_remote_code") == "True":
                found.add(said)
    return found


def names_in(node: ast.Import | ast.ImportFrom) -> list[str]:
    """The whole names that a line imports; ``from m import *`` as `m.*`."""
    prefix = f"{node.module}." if isinstance(node, ast.ImportFrom) and not node.level else ""
    return [prefix + each.name for each in node.names]


def imported(tree: ast.Module) -> dict[str, str]:
    """The whole names of what a module imports, by the names that it gives them."""
    known = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            for each, name in zip(node.names, names_in(node), strict=True):
                short = each.asname or each.name.partition(".")[0]
                known[short] = name if each.asname or isinstance(node, ast.ImportFrom) else short
    return known


def whole_name(node: ast.expr, known: dict[str, str]) -> str:
    """`sp.run` as ``subprocess.run`` where `sp` is that; what is no name of an import begins with a dot."""
    if isinstance(node, ast.Name):
        return known.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        return f"{whole_name(node.value, known)}.{node.attr}"
    return ""


def test_nothing_starts_a_program_or_runs_what_it_reads():
    files = [path for floor in ("bivlm", "tasks", "flows") for path in (ROOT / floor).rglob("*.py")]
    assert len(files) > 100
    assert {f"{path.name}: {what}" for path in files for what in dangerous(path.read_text("utf-8"))} == ALLOWED
    assert issubclass(_Loader, yaml.SafeLoader)


@pytest.mark.parametrize(
    "source",
    [
        "import os; os.system(x)",
        "import os; os.popen(x)",
        "from os import system",
        "from os import *",
        "import os as o; o.execvp('sh', x)",
        "import os; os.spawnlp(os.P_WAIT, 'sh', x)",
        "import os; os.posix_spawn(x, y, z)",
        "import os; list(map(os.system, x))",
        "import subprocess; subprocess.run(['sh', '-c', x])",
        "import subprocess; subprocess.run(x, shell=True)",
        "import subprocess as sp; sp.check_output(x)",
        "import subprocess; subprocess.getoutput(x)",
        "import functools, subprocess; functools.partial(subprocess.Popen, x)",
        "from subprocess import run",
        "from subprocess import *",
        "import asyncio; asyncio.create_subprocess_exec(x)",
        "import psutil; psutil.Popen(x)",
        "anything(x, shell=y)",
        "eval(x)",
        "__import__(x)",
        "import pickle",
        "import pickle as p; p.loads(x)",
        "from pickle import loads",
        "from pickle import Unpickler",
        "import cloudpickle",
        "def read():\n    from dill import load",
        "import marshal",
        "import shelve",
        "import joblib.numpy_pickle",
        "import yaml; yaml.load(x, Loader=yaml.Loader)",
        "import yaml; yaml.load(x)",
        "from yaml import load",
        "import yaml; yaml.unsafe_load(x)",
        "import yaml; yaml.full_load_all(x)",
        "import numpy as np; np.load(x, allow_pickle=True)",
        "import numpy; numpy.load(x, allow_pickle=y)",
        "import pandas as pd; pd.read_pickle(x)",
        "from pandas import read_pickle",
        "import torch; torch.load(x)",
        "import torch; torch.load(x, weights_only=False)",
        "from torch import load; load(x)",
        "import torch; functools.partial(torch.load, x)",
        "AutoModel.from_pretrained(x, trust_remote_code=True)",
    ],
)
def test_each_such_thing_is_seen(source):
    assert dangerous(source)


@pytest.mark.parametrize(
    "source",
    [
        "import subprocess\ntry:\n    pass\nexcept subprocess.TimeoutExpired:\n    pass",
        "import os; os.path.join(x); os.environ.get(y)",
        "import re; re.compile(x)",
        "import yaml; yaml.safe_load(x); yaml.SafeLoader",
        "import numpy; numpy.load(x); numpy.load(x, allow_pickle=False)",
        "import torch; torch.load(x, weights_only=True)",
        "from bivlm.checkpoint.pickles import pickle_names",
        "import json; json.load(x); model.run(x); model.system(x)",
    ],
)
def test_nothing_else_is(source):
    assert dangerous(source) == set()
