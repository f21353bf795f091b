"""Every linear layer of the loaded model is found on disk, and the recipe chooses among them."""

import pytest
import torch
from changed_files import change_json, change_tensors
from safetensors.torch import load_file, save_file
from tiny_llava import make_tiny_llava
from torch import nn
from transformers import AutoModelForImageTextToText, MixtralConfig, MixtralForCausalLM

from bivlm.checkpoint.conversion import loaded_names
from bivlm.checkpoint.linears import anatomy, linears
from bivlm.checkpoint.reading import Checkpoint
from bivlm.errors import InputError
from bivlm.recipe.loading import parse_recipe
from bivlm.recipe.selection import select

METHOD = {"method": "bivlm", "groups": 2, "p_max": 0.05}
COMPONENTS = ("vision", "adaptor", "language")
HEAD = "language_model.lm_head.weight"


def recipe(components=COMPONENTS, keep=("lm_head",)):
    return parse_recipe({"name": "r", "format": 1, "components": dict.fromkeys(components, METHOD), "keep": list(keep)})


def as_in_memory(name):
    """The names that a model has in memory, which transformers reads as well."""
    for old, new in (("language_model.lm_head", "lm_head"), ("language_model.model.", "model.language_model.")):
        name = new + name.removeprefix(old) if name.startswith(old) else name
    return f"model.{name}" if name.startswith(("vision_tower", "multi_modal_projector")) else name


def as_on_the_hub(name):
    """The names of the published LLaVA 1.5 checkpoints, with one more level in the vision tower."""
    return name.replace("vision_tower.", "vision_tower.vision_model.")


@pytest.fixture(params=[None, as_in_memory, as_on_the_hub], ids=["as-saved", "as-in-memory", "as-on-the-hub"])
def layout(request, tmp_path):
    folder = make_tiny_llava(tmp_path / "llava")
    if request.param is not None:
        weights = folder / "model.safetensors"
        save_file({request.param(name): tensor for name, tensor in load_file(weights).items()}, weights)
    return folder


def test_every_linear_of_the_loaded_model_is_found_on_disk(layout):
    model = AutoModelForImageTextToText.from_pretrained(layout)
    checkpoint = Checkpoint.open(layout)
    found = {linear.name: checkpoint.read(linear.disk_name) for linear in linears(checkpoint)}
    in_model = {name: module.weight for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert list(found) == list(in_model)
    assert all(torch.equal(found[name], weight) for name, weight in in_model.items())


def test_every_tensor_is_either_a_linear_or_left_alone(tiny_llava):
    checkpoint = Checkpoint.open(tiny_llava)
    parts = anatomy(checkpoint)
    names = [linear.disk_name for linear in parts.linears] + [tensor.disk_name for tensor in parts.left_alone]
    assert sorted(names) == list(checkpoint.entries)


def test_what_is_left_alone_says_what_it_is(tiny_llava):
    kinds = {tensor.disk_name: tensor.kind for tensor in anatomy(Checkpoint.open(tiny_llava)).left_alone}
    assert kinds["language_model.model.embed_tokens.weight"] == "Embedding"
    assert kinds["vision_tower.embeddings.patch_embedding.weight"] == "Conv2d"
    assert kinds["language_model.model.layers.0.self_attn.q_proj.bias"] == "Linear.bias"


def test_leftovers_are_norms_biases_embedding_and_head_by_their_names_on_disk(tiny_llava):
    checkpoint = Checkpoint.open(tiny_llava)
    parts = anatomy(checkpoint)
    body = [linear for linear in parts.linears if linear.name != "lm_head"]
    found = parts.leftovers(body)
    assert found["language_model.model.embed_tokens.weight"] == "model.language_model.embed_tokens.weight"
    assert found["language_model.lm_head.weight"] == "lm_head.weight"
    assert found["vision_tower.embeddings.patch_embedding.bias"] == "model.vision_tower.embeddings.patch_embedding.bias"
    tables = {"language_model.model.embed_tokens.weight", "language_model.lm_head.weight"}
    assert set(found) == tables | {name for name, entry in checkpoint.entries.items() if len(entry.shape) == 1}
    # Layers that are not packed are none, embedding and head are not where they are packed.
    assert parts.leftovers([]) == found
    assert set(parts.leftovers([parts.tokens, parts.packable["lm_head"]])) == set(found) - tables


def test_a_tensor_that_the_model_does_not_have_is_left_alone(tmp_path):
    folder = make_tiny_llava(tmp_path / "llava")
    change_tensors(folder, lambda tensors: tensors.update({"rotary.inv_freq": torch.ones(2)}))
    kinds = {tensor.disk_name: tensor.kind for tensor in anatomy(Checkpoint.open(folder)).left_alone}
    assert kinds["rotary.inv_freq"] == "not used by the model"
    assert "rotary.inv_freq" not in anatomy(Checkpoint.open(folder)).leftovers([])


def test_a_linear_whose_weight_other_code_reads_is_left_alone(tmp_path):
    # SigLIP's pooling head is a torch.nn.MultiheadAttention, which never calls its out_proj.
    folder = make_tiny_llava(tmp_path / "llava", vision={"vision_use_head": True})
    parts = anatomy(Checkpoint.open(folder))
    kinds = {tensor.disk_name: tensor.kind for tensor in parts.left_alone}
    assert kinds["vision_tower.head.attention.out_proj.weight"] == "NonDynamicallyQuantizableLinear"
    assert "model.vision_tower.head.mlp.fc1" in {linear.name for linear in parts.linears}


def test_weights_that_are_merged_while_loading_are_marked():
    config = MixtralConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=2,
    )
    with torch.device("meta"):
        model = MixtralForCausalLM(config)
    expert = "model.layers.0.block_sparse_moe.experts.1.w1.weight"
    query = "model.layers.0.self_attn.q_proj.weight"
    loaded = loaded_names(model, [expert, query])
    assert loaded[expert].converted
    assert loaded[expert].names[0] in model.state_dict()
    assert loaded[query].names == (query,) and not loaded[query].converted


def test_a_linear_without_a_tensor_is_named(tmp_path):
    folder = make_tiny_llava(tmp_path / "llava")
    change_tensors(folder, lambda tensors: tensors.pop("multi_modal_projector.linear_1.weight"))
    with pytest.raises(InputError, match=r"the tensor of model\.multi_modal_projector\.linear_1\.weight is missing"):
        linears(Checkpoint.open(folder))


def test_a_weight_of_another_shape_than_the_config_says_is_named(tmp_path):
    folder = make_tiny_llava(tmp_path / "llava")
    change_tensors(folder, lambda tensors: tensors.update({HEAD: tensors[HEAD][:100].clone()}))
    with pytest.raises(InputError, match=r"lm_head\.weight: shape \(100, 64\) on disk, \(259, 64\) by the config"):
        linears(Checkpoint.open(folder))


def test_two_tensors_for_one_weight_are_named(tmp_path):
    folder = make_tiny_llava(tmp_path / "llava")
    change_tensors(folder, lambda tensors: tensors.update({"lm_head.weight": tensors[HEAD].clone()}))
    with pytest.raises(InputError, match=r"are both loaded as lm_head\.weight"):
        linears(Checkpoint.open(folder))


def test_an_unknown_architecture_is_named(tmp_path):
    folder = make_tiny_llava(tmp_path / "llava")
    change_json(folder / "config.json", lambda config: config.update(model_type="clip"))
    with pytest.raises(InputError, match=r"model_type 'clip'; known are gemma3, .*mllama"):
        linears(Checkpoint.open(folder))


def test_a_checkpoint_of_another_quantization_method_is_refused(tmp_path):
    folder = make_tiny_llava(tmp_path / "llava")
    change_json(folder / "config.json", lambda config: config.update(quantization_config={"quant_method": "gptq"}))
    with pytest.raises(InputError, match="quantized by gptq; expected full precision"):
        linears(Checkpoint.open(folder))


def test_a_config_that_makes_no_model_is_refused(tmp_path):
    folder = make_tiny_llava(tmp_path / "llava")
    change_json(folder / "config.json", lambda config: config["text_config"].update(hidden_size="wide"))
    with pytest.raises(InputError, match=r"llava: its config makes no image-text model"):
        linears(Checkpoint.open(folder))


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tied") / "llava"
    return make_tiny_llava(folder, text={"tie_word_embeddings": True}, tie_word_embeddings=True)


def test_a_tied_head_is_a_linear_that_points_to_the_embedding(tied):
    checkpoint = Checkpoint.open(tied)
    head = linears(checkpoint)[-1]
    assert (head.name, head.tied_to) == ("lm_head", "model.language_model.embed_tokens.weight")
    assert "embed_tokens" in head.disk_name
    assert head.disk_name in {tensor.disk_name for tensor in anatomy(checkpoint).left_alone}


def test_a_tied_head_can_be_kept(tied):
    chosen, kept = select(linears(Checkpoint.open(tied)), recipe())
    assert [linear.name for linear in kept] == ["lm_head"]
    assert len(chosen) == 28


def test_a_tied_head_is_never_packed_through_the_embedding(tied):
    with pytest.raises(InputError, match=r"lm_head shares its tensor with .*embed_tokens.*add lm_head to 'keep'"):
        select(linears(Checkpoint.open(tied)), recipe(keep=()))


@pytest.fixture(scope="module")
def layers(tiny_llava):
    return linears(Checkpoint.open(tiny_llava))


def test_a_component_left_out_is_kept(layers):
    chosen, kept = select(layers, recipe(components=("adaptor",)))
    assert {linear.component for linear in chosen} == {"adaptor"}
    assert {linear.component for linear in kept} == {"vision", "language"}
    assert len(chosen) + len(kept) == len(layers)


def test_an_exact_name_keeps_one_layer_and_a_pattern_many(layers):
    name = "model.language_model.layers.0.mlp.up_proj"
    _, kept = select(layers, recipe(keep=["lm_head", name, r"re:model\.vision_tower\..*\.fc[12]"]))
    names = {linear.name for linear in kept}
    assert names == {"lm_head", name} | {linear.name for linear in layers if ".fc" in linear.name}


def test_a_pattern_has_to_match_the_whole_name(layers):
    with pytest.raises(InputError, match=r"'re:up_proj' matches no linear"):
        select(layers, recipe(keep=["re:up_proj"]))


def test_a_name_that_matches_nothing_is_refused_with_names_that_would(layers):
    with pytest.raises(InputError, match=r"'language_model\.lm_head' matches no linear layer.*for example .*lm_head"):
        select(layers, recipe(keep=["language_model.lm_head"]))


def test_a_broken_regular_expression_is_refused(layers):
    with pytest.raises(InputError, match=r"'re:\(' is not a regular expression"):
        select(layers, recipe(keep=["re:("]))


def test_a_recipe_that_keeps_everything_is_refused(layers):
    with pytest.raises(InputError, match="leaves no linear layer"):
        select(layers, recipe(keep=["re:.*"]))


def test_a_component_without_linears_is_refused(layers):
    with pytest.raises(InputError, match=r"components\.adaptor: the model has no linear layer"):
        select([linear for linear in layers if linear.component != "adaptor"], recipe())
