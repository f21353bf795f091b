"""Code that comes with a model runs when the user has named that model, and at no other time."""

import json
import os
import shutil
import sys

import pytest
import torch
from raw_codec import pack_linears
from safetensors.torch import save_file
from transformers import LlavaForConditionalGeneration

from bivlm.calibration.blocks.model import _frame
from bivlm.checkpoint.architectures import ARCHITECTURES
from bivlm.checkpoint.linears import linears
from bivlm.checkpoint.reading import Checkpoint
from bivlm.checkpoint.remote_code import VARIABLE, remote_code_allowed, trust, trusted
from bivlm.checkpoint.writing import write_packed_checkpoint
from bivlm.errors import InputError
from bivlm.evaluation.generation import load_model, load_processor
from bivlm.recipe.selection import select
from bivlm.sources.models import resolve_model
from flows.cli import main as cli

CONFIGURATION = """
import os
import pathlib

from transformers import LlavaConfig

from .marking import mark

mark("configuration")


class MarkedConfig(LlavaConfig):
    model_type = "marked_llava"
"""
MODELING = """
from transformers import LlavaForConditionalGeneration

from .configuration_marked import MarkedConfig
from .marking import mark

mark("modeling")


class MarkedForConditionalGeneration(LlavaForConditionalGeneration):
    config_class = MarkedConfig
"""
PROCESSING = """
from transformers import LlavaProcessor

from .marking import mark

mark("processing")


class MarkedProcessor(LlavaProcessor):
    pass
"""
MARKING = """
import os
import pathlib


def mark(part):
    pathlib.Path(os.environ["BIVLM_TEST_MARKER"], part).touch()
"""
FILES = {
    "configuration_marked.py": CONFIGURATION,
    "modeling_marked.py": MODELING,
    "processing_marked.py": PROCESSING,
    "marking.py": MARKING,
}
AUTO_MAP = {
    "AutoConfig": "configuration_marked.MarkedConfig",
    "AutoModelForImageTextToText": "modeling_marked.MarkedForConditionalGeneration",
}


def change(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.fixture
def marked(tiny_llava, tmp_path):
    """A model whose code leaves a mark where it runs, and of an architecture that transformers does not know."""
    folder = shutil.copytree(tiny_llava, tmp_path / "marked")
    for name, code in FILES.items():
        (folder / name).write_text(code)
    change(folder / "config.json", model_type="marked_llava", architectures=["Marked"], auto_map=AUTO_MAP)
    model = LlavaForConditionalGeneration.from_pretrained(tiny_llava)
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, folder / "model.safetensors", {"format": "pt"})  # without llava's renamings, which are its own
    return folder


@pytest.fixture
def marks(tmp_path, monkeypatch):
    """What has left a mark."""
    place = tmp_path / "marks"
    place.mkdir()
    monkeypatch.setenv("BIVLM_TEST_MARKER", str(place))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv(VARIABLE, "")  # put back at the end, whatever is named until then
    monkeypatch.setitem(ARCHITECTURES, "marked_llava", ARCHITECTURES["llava"])
    yield lambda: sorted(path.name for path in place.iterdir())
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        del sys.modules[name]


BUILDING = {
    "to list its linears": lambda folder: linears(Checkpoint.open(folder)),
    "for its blocks": lambda folder: _frame(Checkpoint.open(folder)),
    "to answer": load_model,
    "for its processor": load_processor,
}


@pytest.mark.parametrize("purpose", BUILDING)
def test_code_of_a_model_that_was_not_named_does_not_run(purpose, marked, marks):
    trust(["maker/other"])
    with pytest.raises(InputError, match=r"model_type 'marked_llava'.*\(named now: maker/other\)") as refused:
        BUILDING[purpose](marked)
    assert f"--trust-remote-code {marked}" in str(refused.value)
    assert "configuration_marked.py, modeling_marked.py" in str(refused.value)
    assert marks() == []


def test_code_of_a_model_that_was_named_runs(marked, marks):
    trust([str(marked)])
    names = {linear.name for linear in linears(Checkpoint.open(marked))}
    assert "model.language_model.layers.0.self_attn.q_proj" in names
    assert marks() == ["configuration", "modeling"]
    model, _ = load_model(marked, dtype=torch.bfloat16)
    assert type(model).__name__ == "MarkedForConditionalGeneration"


def test_another_folder_of_the_same_name_is_not_meant(marked, marks, tmp_path):
    trust([str(marked)])
    other = shutil.copytree(marked, tmp_path / "elsewhere" / "marked")
    with pytest.raises(InputError, match="trust-remote-code"):
        linears(Checkpoint.open(other))


def test_code_that_is_not_needed_is_left_alone(tiny_llava, tmp_path, marks):
    folder = shutil.copytree(tiny_llava, tmp_path / "known")
    for name, code in FILES.items():
        (folder / name).write_text(code)
    change(folder / "config.json", auto_map=AUTO_MAP)
    assert linears(Checkpoint.open(folder))
    load_model(folder)
    assert marks() == []


def test_a_processor_that_is_code_is_refused_too(tiny_llava, tmp_path, marks):
    folder = shutil.copytree(tiny_llava, tmp_path / "processor")
    for name, code in FILES.items():
        (folder / name).write_text(code)
    own = {"auto_map": {"AutoProcessor": "processing_marked.MarkedProcessor"}, "processor_class": "MarkedProcessor"}
    change(folder / "processor_config.json", **own)
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer | own))
    change(folder / "config.json", model_type="marked_llava")
    with pytest.raises(InputError, match=r"its processor or tokenizer is code of its own.*\(processing_marked.py\)"):
        load_processor(folder)
    assert marks() == []


HIDDEN = {
    "in a part of the config": ({"text_config": {"auto_map": {"AutoModel": "evil.Model"}}}, "a part of its config"),
    "as an attention kernel": ({"text_config": {"_attn_implementation": "maker/kernel"}}, "kernel from the hub"),
}


@pytest.mark.parametrize("where", HIDDEN)
def test_code_asked_for_elsewhere_than_usual_is_seen(where, tiny_llava, tmp_path, marks):
    changes, said = HIDDEN[where]
    folder = shutil.copytree(tiny_llava, tmp_path / "hidden")
    config = json.loads((folder / "config.json").read_text())
    for part, more in changes.items():
        config[part] |= more
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=said):
        remote_code_allowed(folder)


def test_code_of_another_repository_is_refused_even_when_named(marked, marks):
    change(marked / "config.json", auto_map={"AutoConfig": "maker/other--configuration.Config"})
    trust([str(marked)])
    with pytest.raises(InputError, match="takes code from maker/other, which its own revision does not pin"):
        remote_code_allowed(marked)


def test_code_in_a_folder_below_is_refused_even_when_named(marked, marks):
    change(marked / "config.json", auto_map={"AutoConfig": "below/configuration.Config"})
    trust([str(marked)])
    with pytest.raises(InputError, match=r"takes code from below/configuration\.py, which its own revision"):
        remote_code_allowed(marked)


def test_code_of_another_repository_is_seen_in_a_list_too(marked, marks):
    change(marked / "tokenizer_config.json", auto_map=["maker/other--slow.Tokenizer", None])
    trust([str(marked)])
    with pytest.raises(InputError, match="takes code from maker/other"):
        remote_code_allowed(marked)


SPELLINGS = {
    "as usual": ("config.json", '"auto_map": {"AutoConfig": "marking.C"}'),
    "with an escape": ("config.json", '"auto\\u005fmap": {"AutoConfig": "marking.C"}'),
    "in a list of parts": ("config.json", '"parts": [{"auto\\u005fmap": {}}]'),
    "null": ("processor_config.json", '"\\u0061uto_map": null'),
    "of images": ("preprocessor_config.json", '"auto_map": {"AutoImageProcessor": "marking.C"}'),
    "of films": ("video_preprocessor_config.json", '"auto_map": {"AutoVideoProcessor": "marking.C"}'),
    "of a tokenizer": ("tokenizer_config.json", '"auto_map": ["marking.C", null]'),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_code_is_in_the_digest_however_its_name_is_written(spelling, tiny_llava, tmp_path):
    name, text = SPELLINGS[spelling]
    folder = shutil.copytree(tiny_llava, tmp_path / "spelled")
    (folder / "marking.py").write_text(MARKING)
    assert "marking.py" not in Checkpoint.open(folder).digests().files
    before = (folder / name).read_text().rstrip().removesuffix("}").rstrip() if (folder / name).exists() else "{"
    (folder / name).write_text(f"{before}{',' if before != '{' else ''} {text}}}")
    digests = Checkpoint.open(folder).digests()
    assert "marking.py" in digests.files
    (folder / "marking.py").write_text(MARKING + "# another line")
    assert Checkpoint.open(folder).digest() != digests.sha256


def test_a_generate_of_its_own_is_in_the_digest(tiny_llava, tmp_path, marks):
    """transformers runs it for a model that is trusted, whatever its configs say."""
    folder = shutil.copytree(tiny_llava, tmp_path / "generating")
    (folder / "custom_generate").mkdir()
    code = f"{MARKING}\n\nmark('generate')\n\n\ndef generate(model, *arguments, **options):\n    return None\n"
    (folder / "custom_generate" / "generate.py").write_text(code)
    load_model(folder)
    assert marks() == []
    trust([str(folder)])
    load_model(folder)
    assert marks() == ["generate"]
    digests = Checkpoint.open(folder).digests()
    assert "custom_generate/generate.py" in digests.files
    (folder / "custom_generate" / "generate.py").write_text(code + "# another line")
    assert Checkpoint.open(folder).digest() != digests.sha256


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer_config.json", "marking.py"])
def test_a_link_out_of_the_folder_is_refused_before_it_is_read(name, marked, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (marked / name).rename(outside / name)
    (marked / name).symlink_to(outside / name)
    with pytest.raises(InputError, match=rf"{name}: a link to {outside}/{name}, outside the folder"):
        Checkpoint.open(marked)


@pytest.mark.parametrize("name", ["nothing", "./nothing/here", "a/b/c", "/absolute"])
def test_a_name_that_can_be_none_is_refused(name, marks):
    with pytest.raises(InputError, match=r"--trust-remote-code .*: no such folder, and not a hub id"):
        trust([name])
    assert trusted() == ()


def test_a_folder_whose_path_would_be_read_as_two_is_refused(marked, marks, tmp_path):
    folder = tmp_path / f"{marked.name}{os.pathsep}b"
    folder.mkdir()
    with pytest.raises(InputError, match=f"found '{os.pathsep}', which separates names"):
        trust([str(folder)])
    assert trusted() == ()


def test_names_add_up_where_other_processes_read_them(marked, marks, monkeypatch):
    monkeypatch.setenv(VARIABLE, "maker/one")
    trust(["maker/two", str(marked), "maker/one"])
    assert os.environ[VARIABLE].split(os.pathsep) == ["maker/one", "maker/two", str(marked)]
    assert remote_code_allowed(marked)


def test_a_packed_checkpoint_carries_its_code_and_has_to_be_named_again(marked, marks, tmp_path, whole_recipe, capsys):
    trust([str(marked)])
    checkpoint = Checkpoint.open(marked)
    chosen, _ = select(linears(checkpoint), whole_recipe)
    packed = pack_linears(checkpoint, chosen)
    output = write_packed_checkpoint(checkpoint, packed, chosen, tmp_path / "packed", {})
    assert {name: (output / name).read_text() for name in FILES} == FILES
    assert set(FILES) <= set(Checkpoint.open(output).digests().files), "changed code would not be noticed"
    with pytest.raises(InputError, match=f"--trust-remote-code {output}"):
        load_model(output)
    assert cli.main(["inspect", "--model", str(output)]) == 2
    before = marks()
    assert cli.main(["bits", str(output)]) == 0  # counted from the files alone
    assert marks() == before
    assert cli.main(["inspect", "--model", str(output), "--trust-remote-code", str(output)]) == 0
    model, _ = load_model(output)
    assert type(model).__name__ == "MarkedForConditionalGeneration"


def test_from_the_hub_neither_code_nor_weights_come_unless_named(hub, marked, marks):
    hub.add("maker/marked", marked)
    with pytest.raises(InputError, match=r"model maker/marked: .*say --trust-remote-code maker/marked"):
        resolve_model("maker/marked")
    assert not hub.asked("GET", "/large/")
    assert not hub.asked("GET", ".py")
    trust(["maker/marked"])
    resolved = resolve_model("maker/marked")
    assert set(FILES) <= {path.name for path in resolved.folder.iterdir()}
    assert marks() == []
    assert linears(Checkpoint.open(resolved.folder))
    assert marks() == ["configuration", "modeling"]


def test_the_command_names_what_may_run(hub, marked, marks, capsys):
    hub.add("maker/marked", marked)
    command = ["inspect", "--model", "maker/marked", "--json"]
    assert cli.main(command) == 2
    err = capsys.readouterr().err
    assert "--trust-remote-code maker/marked" in err and "Traceback" not in err
    assert marks() == []
    assert cli.main([*command, "--trust-remote-code", "maker/marked"]) == 0
    assert json.loads(capsys.readouterr().out)["model_type"] == "marked_llava"
    assert marks() == ["configuration", "modeling"]
