"""A model that keeps its weights packed is cast, copied, saved and compiled as any other, or says what to do."""

import copy
import io

import pytest
import torch
from safetensors.torch import load_file
from tiny_families import gemma3, llava, make_tiny
from torch import nn
from transformers import AutoModel, AutoModelForImageTextToText

from bivlm.checkpoint.linears import anatomy
from bivlm.checkpoint.packed_modules import PackedEmbedding, PackedLinear
from bivlm.checkpoint.reading import TABLES_KEY, Checkpoint
from bivlm.checkpoint.transformers_plugin import BiVLMConfig
from bivlm.checkpoint.writing import write_packed_checkpoint
from bivlm.errors import InputError
from bivlm.numerics.uniform_grid import round_to_nearest
from bivlm.packing import grouped

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]

pytestmark = pytest.mark.filterwarnings("ignore:You passed `quantization_config`")


@pytest.fixture(
    scope="module", params=[pytest.param(llava, marks=pytest.mark.slow), gemma3], ids=lambda build: build.__name__
)
def packed(request, tmp_path_factory):
    """(folder, inputs): every linear layer and both tables are packed; gemma3's are tied, and scale their rows."""
    base = tmp_path_factory.mktemp("forward") / "base"
    inputs = make_tiny(request.param, base)
    checkpoint = Checkpoint.open(base)
    parts = anatomy(checkpoint)
    chosen = [linear for linear in parts.packable.values() if linear.tied_to is None]
    tensors = {}
    for linear in chosen:
        codes = round_to_nearest(checkpoint.read(linear.disk_name), 4, 16)
        tensors[linear.name] = lambda codes=codes, dtype=linear.dtype: grouped.pack(codes, dtype)
    tables = {TABLES_KEY: [parts.tokens.name]}
    return write_packed_checkpoint(checkpoint, tensors, chosen, base.with_name("packed"), tables), inputs


@pytest.fixture(scope="module")
def dense(packed):
    """The ordinary model."""
    return load(packed[0], "load")


def load(folder, dequantize="forward", kind=AutoModelForImageTextToText, **options):
    return kind.from_pretrained(folder, quantization_config=BiVLMConfig(dequantize=dequantize), **options)


def logits(model, inputs, dtype=None):
    given = {name: each.to(dtype) if dtype and each.is_floating_point() else each for name, each in inputs.items()}
    with torch.no_grad():
        return model(**given).logits


def dtypes(model):
    return {weight.dtype for weight in model.parameters() if weight.dtype != torch.uint8}


@pytest.mark.parametrize("dtype", DTYPES)
class TestCasts:
    def test_layers_follow_a_cast_of_the_model(self, packed, dense, dtype):
        model = load(packed[0]).to(dtype)
        layers = [module for module in model.modules() if isinstance(module, PackedLinear | PackedEmbedding)]
        assert {layer.dtype for layer in layers} == {dtype}
        expected = logits(copy.deepcopy(dense).to(dtype), packed[1], dtype)
        assert expected.dtype == dtype
        assert torch.equal(logits(model, packed[1], dtype), expected)

    def test_dequantizing_after_a_cast_leaves_one_dtype(self, packed, dense, dtype):
        model = load(packed[0]).to(dtype).dequantize()
        assert dtypes(model) == {dtype}
        assert torch.equal(logits(model, packed[1], dtype), logits(copy.deepcopy(dense).to(dtype), packed[1], dtype))

    def test_dequantizing_into_a_dtype_casts_what_was_not_packed_too(self, packed, dense, dtype):
        model = load(packed[0]).dequantize(dtype=dtype)
        assert dtypes(model) == {dtype}
        expected = copy.deepcopy(dense)
        for weight in expected.parameters():
            weight.data = weight.data.to(dtype)
        assert torch.equal(logits(model, packed[1], dtype), logits(expected, packed[1], dtype))

    def test_both_ways_of_loading_in_a_dtype_compute_the_same(self, packed, dtype):
        ways = [load(packed[0], how, dtype=dtype) for how in ("load", "forward")]
        assert [dtypes(model) for model in ways] == [{dtype}, {dtype}]
        assert torch.equal(*(logits(model, packed[1], dtype) for model in ways))

    def test_a_layer_alone_follows_it(self, packed, dense, dtype):
        model, ids = load(packed[0]), packed[1]["input_ids"]
        model.get_input_embeddings().to(dtype)
        expected = copy.deepcopy(dense.get_input_embeddings()).to(dtype)(ids)
        assert torch.equal(model.get_input_embeddings()(ids), expected)
        x = torch.randn(3, 32).to(dtype)
        head = copy.deepcopy(dense.get_output_embeddings()).to(dtype)
        assert torch.equal(model.get_output_embeddings().to(dtype)(x), head(x))

    def test_a_cast_model_is_saved_with_the_same_packed_bytes(self, packed, tmp_path, dtype):
        load(packed[0]).to(dtype).save_pretrained(tmp_path)
        before, after = (load_file(folder / "model.safetensors") for folder in (packed[0], tmp_path))
        assert sorted(before) == sorted(after)
        assert {name for name, tensor in after.items() if tensor.dtype != dtype} == {
            name for name, tensor in before.items() if tensor.dtype == torch.uint8 and torch.equal(tensor, after[name])
        }
        assert dtypes(AutoModelForImageTextToText.from_pretrained(tmp_path)) == {dtype}


def test_autocast_computes_what_it_does_of_the_ordinary_model(packed, dense):
    models = (load(packed[0]).to(torch.float32), copy.deepcopy(dense).to(torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        ours, expected = (logits(model, packed[1], torch.float32) for model in models)
    assert torch.equal(ours, expected)


def test_a_copy_and_a_pickle_are_cast_apart_from_the_model(packed, dense):
    model, stream = load(packed[0]), io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    for other in (copy.deepcopy(model), torch.load(stream, weights_only=False)):
        assert torch.equal(logits(other, packed[1]), logits(dense, packed[1]))
        other.to(torch.float64)
        assert dtypes(other) == {torch.float64} and dtypes(model) == {torch.bfloat16}
        assert torch.equal(logits(model, packed[1]), logits(dense, packed[1]))


def test_the_state_dict_has_the_names_of_the_ordinary_model(packed, dense):
    model = load(packed[0])
    assert sorted(model.state_dict()) == sorted(dense.state_dict())
    assert not any(load(packed[0]).load_state_dict(model.state_dict()))
    assert {weight.device.type for weight in model.to("meta").parameters()} == {"meta"}


@pytest.mark.parametrize("dequantize", ["load", "forward"])
def test_the_base_model_alone_loads_without_the_packed_head(packed, dense, dequantize):
    model, info = load(packed[0], dequantize, AutoModel, output_loading_info=True)
    assert not info["missing_keys"]
    with torch.no_grad():
        assert torch.equal(model(**packed[1]).last_hidden_state, dense.model(**packed[1]).last_hidden_state)


def test_resizing_packed_tables_says_what_to_do_first(packed, dense):
    model = load(packed[0])
    with pytest.raises(InputError, match=r"the head is packed; call model\.dequantize\(\) first"):
        copy.deepcopy(model).resize_token_embeddings(70)
    resized = model.dequantize()
    resized.resize_token_embeddings(70)
    assert torch.equal(resized.get_input_embeddings().weight[:64], dense.get_input_embeddings().weight)
    assert logits(resized, packed[1]).shape[-1] == 70


def test_inference_mode_and_other_integers(packed, dense):
    model, expected = load(packed[0]), logits(dense, packed[1])
    with torch.inference_mode():
        assert torch.equal(model(**packed[1]).logits, expected)
    assert torch.equal(logits(model, packed[1] | {"input_ids": packed[1]["input_ids"].int()}), expected)
    embedding = model.get_input_embeddings()
    assert embedding(torch.zeros(2, 0, dtype=torch.long)).shape == (2, 0, 32)


@pytest.mark.parametrize("number", [-1, 64])
def test_a_number_that_is_no_row_is_refused(packed, number):
    with pytest.raises(IndexError, match=rf"embed_tokens\.weight: row {number} of a table of 64"):
        load(packed[0]).get_input_embeddings()(torch.tensor([[3, number]]))


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`")
def test_gradients_pass_through_checkpointed_blocks(packed, dense):
    found = []
    for model in (load(packed[0]), copy.deepcopy(dense)):
        model.gradient_checkpointing_enable()
        images = packed[1]["pixel_values"].clone().requires_grad_()
        model.train()(**packed[1] | {"pixel_values": images}).logits.sum().backward()
        found.append(images.grad)
    assert found[0].any() and torch.equal(*found)


def test_an_input_cast_to_the_dtype_of_the_packed_bytes_is_refused():
    layer = PackedLinear.replacing(nn.Linear(4, 3), 40, "wo")  # T5 casts to the dtype of wo.weight
    with pytest.raises(InputError, match=r"wo: an input of torch\.uint8.*dequantize 'load'"):
        layer(torch.zeros(2, 4).to(layer.weight.dtype))


class TestPlaces:
    @pytest.mark.parametrize("dequantize", ["load", "forward"])
    @pytest.mark.parametrize("place", ["cpu", "auto"])
    def test_a_device_map_computes_the_same(self, packed, dense, place, dequantize):
        pytest.importorskip("accelerate")
        assert torch.equal(logits(load(packed[0], dequantize, device_map=place), packed[1]), logits(dense, packed[1]))

    @pytest.mark.parametrize("places", [{"": "disk"}, {"": "cpu", "model.language_model.layers.1": "disk"}])
    def test_packed_weights_on_disk_are_refused(self, packed, places, tmp_path):
        pytest.importorskip("accelerate")
        with pytest.raises(InputError, match=r"\.weight: offloaded to disk; packed weights have to be on a CPU"):
            load(packed[0], device_map=places, offload_folder=tmp_path)


class TestCompiled:
    @pytest.fixture(autouse=True)
    def _afresh(self):
        torch._dynamo.reset()
        yield
        torch._dynamo.reset()

    @pytest.mark.slow
    def test_a_compiled_model_computes_and_generates_the_same(self, packed, dense):
        model = load(packed[0])
        expected = dense.generate(**packed[1], max_new_tokens=4, do_sample=False)
        assert torch.equal(logits(torch.compile(model, backend="eager"), packed[1]), logits(dense, packed[1]))
        model.forward = torch.compile(model.forward, backend="eager")
        assert torch.equal(model.generate(**packed[1], max_new_tokens=4, do_sample=False), expected)

    def test_a_linear_layer_is_one_graph_and_an_embedding_is_not(self, packed, dense):
        model, x, ids = load(packed[0]), torch.randn(2, 32).to(torch.bfloat16), packed[1]["input_ids"]
        head = torch.compile(model.get_output_embeddings(), backend="eager", fullgraph=True)
        assert torch.equal(head(x), dense.get_output_embeddings()(x))
        embedding = torch.compile(model.get_input_embeddings(), backend="eager")
        assert torch.equal(embedding(ids), dense.get_input_embeddings()(ids))

    @pytest.mark.slow
    def test_inductor_computes_what_it_does_of_the_ordinary_model(self, packed, dense):
        ours = logits(torch.compile(load(packed[0]), backend="inductor"), packed[1])
        torch._dynamo.reset()
        assert torch.equal(ours, logits(torch.compile(copy.deepcopy(dense), backend="inductor"), packed[1]))
