"""Experts that lie on disk one by one: each is packed under its own name and rebuilt before they are stacked."""

import pytest
import torch
from changed_files import change_tensors
from raw_codec import pack_linears
from tiny_families import glm4v_moe, make_published, qwen3_vl_moe
from transformers import AutoModelForImageTextToText

from bivlm.checkpoint.linears import anatomy, linears
from bivlm.checkpoint.reading import Checkpoint
from bivlm.checkpoint.transformers_plugin import BiVLMConfig
from bivlm.checkpoint.writing import write_packed_checkpoint
from bivlm.errors import InputError
from bivlm.recipe.loading import parse_recipe
from bivlm.recipe.selection import select
from bivlm.reports.inspection import inspect

EXPERTS = "model.language_model.layers.1.mlp.experts"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experts") / "base"
    folder.mkdir()
    make_published(glm4v_moe, folder)
    return folder


def recipe(settings=None, **further):
    components = {"language": settings or {"method": "rtn", "bits": 2}}
    return parse_recipe({"name": "experts", "format": 1, "components": components, **further})


def pack(base, output, keep=("lm_head",)):
    checkpoint = Checkpoint.open(base)
    chosen, _ = select(linears(checkpoint), recipe(keep=list(keep)))
    packed = pack_linears(checkpoint, chosen)
    return write_packed_checkpoint(checkpoint, packed, chosen, output, {})


def test_every_expert_is_a_linear_of_its_own_at_its_place(base):
    found = linears(Checkpoint.open(base))
    experts = [linear for linear in found if linear.stacked_in]
    assert len(experts) == 2 * 4 * 3  # layers, experts, projections
    names = [linear.name for linear in found]
    at = names.index(f"{EXPERTS}.0.gate_proj")
    assert names.index("model.language_model.layers.1.self_attn.o_proj") < at < names.index("lm_head")
    assert (found[at].shape, found[at].component) == ((24, 32), "language")
    assert found[at].stacked_in == f"{EXPERTS}.gate_up_proj"


def test_experts_of_one_tensor_on_disk_are_left_alone(tmp_path):
    make_published(qwen3_vl_moe, tmp_path)
    parts = anatomy(Checkpoint.open(tmp_path))
    assert not any(linear.stacked_in for linear in parts.linears)
    assert sum("Qwen3VLMoeTextExperts" in tensor.kind for tensor in parts.left_alone) == 4


def test_the_table_tells_experts_from_layers(base):
    parts = {part["kind"]: part for part in inspect(base, statistics=False)["parts"] if part["component"] == "language"}
    assert parts["experts, one by one"]["tensors"] == 24
    assert parts["experts, one by one"]["parameters"] == 24 * 24 * 32
    assert parts["experts, one by one"]["state"] == "packable"


def test_some_experts_may_be_kept(base, tmp_path):
    packed = pack(base, tmp_path / "packed", ["lm_head", rf"re:{EXPERTS}\.[01]\..*"])
    names = Checkpoint.open(packed).packed
    assert f"{EXPERTS}.2.gate_proj" in names and f"{EXPERTS}.1.gate_proj" not in names
    before = AutoModelForImageTextToText.from_pretrained(base).get_parameter(f"{EXPERTS}.gate_up_proj")
    after = AutoModelForImageTextToText.from_pretrained(packed).get_parameter(f"{EXPERTS}.gate_up_proj")
    assert [torch.equal(one, other) for one, other in zip(before, after, strict=True)] == [True, True, False, False]


def test_weights_are_rebuilt_in_the_dtype_that_is_asked_for(base, tmp_path):
    packed = pack(base, tmp_path / "packed")
    name = f"{EXPERTS}.down_proj"
    plain = AutoModelForImageTextToText.from_pretrained(packed).get_parameter(name)
    wide = AutoModelForImageTextToText.from_pretrained(packed, dtype=torch.float32).get_parameter(name)
    assert wide.dtype == torch.float32
    assert torch.equal(wide, plain.float())


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
def test_packed_experts_are_not_rebuilt_at_every_call(base, tmp_path):
    packed = pack(base, tmp_path / "packed")
    with pytest.raises(InputError, match=r"expected 'load', since experts \(.*\.experts\..* and 23 more\)"):
        AutoModelForImageTextToText.from_pretrained(packed, quantization_config=BiVLMConfig(dequantize="forward"))


@pytest.mark.parametrize(
    ("further", "said"),
    [
        ({"settings": {"method": "gptq", "bits": 2}}, "gptq looks at a layer's inputs"),
        ({"finish": "kl"}, "'finish' runs layers"),
    ],
)
def test_what_needs_a_layer_refuses_experts_and_says_how_to_keep_them(base, further, said):
    found = linears(Checkpoint.open(base))
    with pytest.raises(InputError, match=rf"layers.1.mlp.experts.0.down_proj is an expert's matrix.*{said}.*to 'keep'"):
        select(found, recipe(**further))
    chosen, _ = select(found, recipe(**further, keep=["lm_head", r"re:.*\.experts\..*"]))
    assert chosen and not any(linear.stacked_in for linear in chosen)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tensors: tensors.pop(f"{EXPERTS}.3.up_proj.weight"), "experts.3.up_proj.weight is missing"),
        (
            lambda tensors: tensors.update({f"{EXPERTS}.3.up_proj.weight": torch.zeros(24, 32, dtype=torch.bfloat16)}),
            "experts.3.up_proj.weight .*BF16 of shape .* expected a packed weight",
        ),
    ],
    ids=["missing", "not packed"],
)
def test_an_expert_that_is_not_what_was_announced_is_named(base, tmp_path, change, said):
    packed = pack(base, tmp_path / "packed")
    change_tensors(packed, change)
    with pytest.raises(InputError, match=said):
        AutoModelForImageTextToText.from_pretrained(packed)


def test_a_damaged_expert_is_no_model(base, tmp_path):
    def change(tensors):
        tensors[f"{EXPERTS}.3.up_proj.weight"][-5:].add_(1)

    packed = pack(base, tmp_path / "packed")
    change_tensors(packed, change)
    with pytest.raises(RuntimeError, match="conversion of the weights"):  # transformers' own, its report says why
        AutoModelForImageTextToText.from_pretrained(packed)
