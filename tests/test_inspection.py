"""An inspection accounts for every parameter once and describes every linear layer."""

import json

import pytest
from raw_codec import top_bytes
from safetensors.torch import load_file, save_file
from tiny_llava import make_tiny_llava

from bivlm.inspection import inspect


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
    assert {key: found["components"][key]["linears"] for key in found["components"]} == {
        "vision": 12,
        "adaptor": 2,
        "language": 15,
    }
    head = found["linears"][-1]
    assert (head["name"], head["component"], head["shape"], head["dtype"], head["packed"]) == (
        "lm_head",
        "language",
        [259, 64],
        "bfloat16",
        False,
    )


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
    file = make_tiny_llava(tmp_path / "llava") / "model.safetensors"
    weights = load_file(file)
    weights["multi_modal_projector.linear_1.weight"].fill_(0.5)
    save_file(weights, file)
    linear = next(linear for linear in inspect(file.parent)["linears"] if linear["name"].endswith("linear_1"))
    assert (linear["std"], linear["kurtosis"], linear["kl_gaussian"]) == (0.0, None, None)


def test_the_figures_are_ready_for_json(found):
    assert json.loads(json.dumps(found, allow_nan=False)) == found
