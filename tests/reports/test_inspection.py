"""An inspection accounts for every parameter once and describes every linear layer."""

import json

import pytest
from changed_files import change_tensors
from raw_codec import top_bytes
from safetensors.torch import load_file
from tiny_families import gemma3, make_published, mllama, qwen3_vl_moe
from tiny_llava import make_tiny_llava

from bivlm.reports.inspection import inspect
from flows.cli.console import print_inspection


@pytest.fixture(scope="module")
def found(tiny_llava):
    return inspect(tiny_llava)


@pytest.fixture(scope="module")
def tensors(tiny_llava):
    return load_file(tiny_llava / "model.safetensors")


def test_parameters_and_shares_add_up(found, tensors):
    assert found["parameters"] == sum(tensor.numel() for tensor in tensors.values())
    parts = [*found["components"].values(), found["left_alone"]]
    assert sum(part["parameters"] for part in parts) == found["parameters"]
    assert sum(part["share"] for part in parts) == pytest.approx(1)


def test_every_tensor_is_listed_once(found, tensors):
    listed = [linear["disk_name"] for linear in found["linears"]]
    listed += [tensor["name"] for tensor in found["left_alone"]["tensors"]]
    assert sorted(listed) == sorted(tensors)


def test_statistics_are_those_of_the_weight(found, tensors):
    linear = found["linears"][0]
    weight = tensors[linear["disk_name"]].double()
    assert linear["mean"] == pytest.approx(weight.mean().item(), abs=1e-12)
    assert linear["std"] == pytest.approx(weight.std(unbiased=False).item())
    kurtosis = ((weight - weight.mean()) ** 4).mean() / weight.var(unbiased=False) ** 2
    assert linear["kurtosis"] == pytest.approx(kurtosis.item())
    assert linear["kl_gaussian"] > 0


def test_linears_say_where_they_belong_and_what_they_are(found):
    counts = {component: part["linears"] for component, part in found["components"].items()}
    assert counts == {"vision": 12, "adaptor": 2, "language": 15}
    head = found["linears"][-1]
    keys = ("name", "component", "shape", "dtype", "packed")
    assert [head[key] for key in keys] == ["lm_head", "language", [259, 64], "bfloat16", False]


def test_a_packed_layer_is_described_by_its_rebuilt_weight(packed_llava, tensors):
    found = inspect(packed_llava)
    linear = found["linears"][0]
    assert linear["packed"] and linear["dtype"] == "bfloat16" and linear["shape"] == [64, 64]
    rebuilt = top_bytes(tensors[linear["disk_name"]]).double()
    assert linear["std"] == pytest.approx(rebuilt.std(unbiased=False).item())
    assert found["quantization"] == "bivlm"
    assert found["components"]["language"]["packed"] == 14


def test_packing_does_not_change_the_number_of_parameters(found, packed_llava):
    assert inspect(packed_llava, statistics=False)["parameters"] == found["parameters"]


def test_without_statistics_no_weight_is_read(tiny_llava, monkeypatch):
    monkeypatch.setattr("bivlm.checkpoint.reading.read_tensor", lambda entry: pytest.fail(entry.name))
    assert "mean" not in inspect(tiny_llava, statistics=False)["linears"][0]


def test_a_tied_head_is_counted_as_the_embedding(tmp_path):
    folder = make_tiny_llava(tmp_path / "llava", text={"tie_word_embeddings": True}, tie_word_embeddings=True)
    found = inspect(folder, statistics=False)
    assert found["linears"][-1]["tied_to"] == "model.language_model.embed_tokens.weight"
    assert found["parameters"] == sum(tensor.numel() for tensor in load_file(folder / "model.safetensors").values())


def test_a_constant_weight_has_no_kurtosis(tmp_path):
    folder = make_tiny_llava(tmp_path / "llava")
    change_tensors(folder, lambda tensors: tensors["multi_modal_projector.linear_1.weight"].fill_(0.5))
    linear = next(linear for linear in inspect(folder)["linears"] if linear["name"].endswith("linear_1"))
    assert (linear["std"], linear["kurtosis"], linear["kl_gaussian"]) == (0.0, None, None)


def test_the_figures_are_ready_for_json(found):
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_the_parts_hold_every_tensor_once_and_add_up(found, tensors):
    parts = found["parts"]
    assert sum(part["tensors"] for part in parts) == len(tensors)
    assert sum(part["parameters"] for part in parts) == found["parameters"]
    assert sum(part["share"] for part in parts) == pytest.approx(1)
    embedding = next(part for part in parts if part["kind"] == "Embedding" and part["component"] == "language")
    assert (embedding["tensors"], embedding["parameters"], embedding["state"]) == (1, 259 * 64, "left alone")
    assert {part["state"] for part in parts if part["kind"] == "linear layers"} == {"packable"}


def test_a_packed_checkpoint_has_packed_parts_beside_those_that_could_be(packed_llava):
    parts = inspect(packed_llava, statistics=False)["parts"]
    found = {(part["component"], part["state"]): part["tensors"] for part in parts if part["kind"] == "linear layers"}
    assert found == {
        ("vision", "packed"): 12,
        ("adaptor", "packed"): 2,
        ("language", "packed"): 14,
        ("language", "packable"): 1,  # the head
    }


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("build", [gemma3, mllama, qwen3_vl_moe], ids=lambda build: build.__name__)
def test_the_table_fits_the_terminal_and_adds_up(build, columns, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    make_published(build, tmp_path)
    print_inspection(inspect(tmp_path))
    table = capsys.readouterr().out.partition(" linear  ")[0].splitlines()
    assert max(map(len, table)) <= columns
    assert sum("left alone" in line or "packable" in line for line in table) > 10
    (total,) = (line for line in table if line.startswith(" all"))
    assert "100.00 %" in total
    shares = [float(line.split(" %")[0].split()[-1]) for line in table if " %" in line and line != total]
    assert sum(shares) == pytest.approx(100, abs=0.1)


def test_a_bare_parameter_and_experts_are_left_alone_by_name(tmp_path):
    for build in (gemma3, qwen3_vl_moe):
        make_published(build, tmp_path / build.__name__)
    kinds = {
        (part["component"], part["kind"]): (part["tensors"], part["parameters"], part["state"])
        for build in (gemma3, qwen3_vl_moe)
        for part in inspect(tmp_path / build.__name__, statistics=False)["parts"]
    }
    assert kinds["adaptor", "mm_input_projection_weight"] == (1, 32 * 32, "left alone")
    assert kinds["language", "experts: gate_up_proj"] == (2, 2 * 4 * 32 * 48, "left alone")
    assert kinds["language", "Router"] == (2, 2 * 4 * 32, "left alone")
    assert kinds["language", "lm_head, tied"] == (0, 0, "left alone")
    assert kinds["vision", "Conv2d"] == (1, 32 * 3 * 16, "left alone")
