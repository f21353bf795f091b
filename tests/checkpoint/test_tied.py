"""What is tied is what the files say: a head beside the embedding is one table where both are equal, two where not."""

import pytest
import torch
from changed_files import change_tensors
from safetensors.torch import save_file
from tied_tables import load, logits, make_base, pack
from tiny_families import gemma3, llava, qwen2_5_vl
from transformers import AutoModelForImageTextToText, BlipConfig, UdopConfig

from bivlm.checkpoint.linears import anatomy
from bivlm.checkpoint.packed_modules import PackedLinear
from bivlm.checkpoint.reading import Checkpoint
from bivlm.checkpoint.writing import check_loads, write_packed_checkpoint
from bivlm.errors import InputError
from bivlm.numerics.uniform_grid import round_to_nearest
from bivlm.packing import grouped, plane_product, side_table, unpack
from bivlm.reports.bits import bits_of
from bivlm.reports.inspection import inspect

HEADS = ("absent", "equal", "different", "alone")  # beside the embedding; alone: the embedding is absent
NORM = "language_model.model.norm.weight"
BUILDERS = [llava, *(pytest.param(build, marks=pytest.mark.slow) for build in (qwen2_5_vl, gemma3))]

pytestmark = pytest.mark.filterwarnings("ignore:You passed `quantization_config`")


def twin(base, tables):
    """The base as transformers loads it, with its packed tables rounded."""
    model = load(base)
    said = {"tokens": ["input"], "head": ["output"], None: []}.get(tables, ["input", "output"])
    rounded = [getattr(model, f"get_{which}_embeddings")().weight for which in said]
    for weight in {id(weight): weight for weight in rounded}.values():  # one, if it is tied
        weight.data = unpack(grouped.pack(round_to_nearest(weight.data, 4, 64), torch.bfloat16))
    return model


def asked(tables):
    return {tables: 4} if isinstance(tables, str) else tables


@pytest.mark.parametrize("build", BUILDERS)
@pytest.mark.parametrize(
    "tables", [None, 4, *(pytest.param(each, marks=pytest.mark.slow) for each in ("tokens", "head"))]
)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("tie", [True, False])
def test_both_ways_of_loading_compute_what_transformers_makes_of_the_base(tmp_path, build, tie, head, tables):
    base = tmp_path / "base"
    inputs = make_base(build, base, tie, head)
    shares = tie and head != "different"
    if not tie and head in ("absent", "alone"):
        with pytest.raises(InputError, match=r"lm_head\.weight is missing|embed_tokens\.weight is missing"):
            anatomy(Checkpoint.open(base))
            check_loads(Checkpoint.open(base), base)
        return
    if shares and tables == "head":
        with pytest.raises(InputError, match="lm_head shares its tensor with"):
            pack(base, tmp_path / "packed", asked(tables))
        return
    folder = pack(base, tmp_path / "packed", asked(tables))
    expected = twin(base, tables)
    packed = [entry.name for entry in Checkpoint.open(folder).entries.values() if entry.dtype == "U8"]
    assert len(packed) == {None: 0, 4: 1 if shares else 2}.get(tables, 1)
    for dequantize in ("load", "forward"):
        model = load(folder, dequantize)
        assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == shares
        assert torch.equal(logits(model, inputs), logits(expected, inputs))
        said = [each.generate(**inputs, max_new_tokens=4, do_sample=False) for each in (model, expected)]
        assert torch.equal(*said)
        model.save_pretrained(tmp_path / dequantize)
        for again in ("load", "forward") if dequantize == "forward" else (None,):
            assert torch.equal(logits(load(tmp_path / dequantize, again), inputs), logits(expected, inputs))
        if dequantize == "forward":
            assert torch.equal(logits(model.dequantize(), inputs), logits(expected, inputs))
    straight = load(folder, "packed")  # whose weights are not rounded to the layers' dtype
    torch.testing.assert_close(logits(straight, inputs), logits(expected, inputs), rtol=0.03, atol=0.03)
    head = straight.get_output_embeddings()
    assert isinstance(head, PackedLinear) == (tables in (4, "head") or (shares and tables == "tokens"))
    if isinstance(head, PackedLinear) and plane_product.lanes():
        assert torch.equal(head.side_table, side_table(head.weight.data))


@pytest.mark.parametrize("shards", [False, True])
def test_an_equal_head_is_stored_and_counted_once(tmp_path, shards):
    inputs = make_base(qwen2_5_vl, tmp_path / "base", True, "equal", shards)
    folder = pack(tmp_path / "base", tmp_path / "packed", 4)
    base, packed = Checkpoint.open(tmp_path / "base"), Checkpoint.open(folder)
    embedding = anatomy(base).tokens
    assert embedding.copies == ("lm_head.weight",)
    assert set(base.entries) - set(packed.entries) == {"lm_head.weight"}
    assert torch.equal(logits(load(folder), inputs), logits(twin(tmp_path / "base", 4), inputs))
    assert bits_of(folder)["tables"]["weights"] == embedding.size
    before, after = inspect(tmp_path / "base"), inspect(folder)
    parameters = sum(weight.numel() for weight in load(tmp_path / "base").parameters())
    assert before["parameters"] == after["parameters"] == parameters
    assert [sum(part["share"] for part in found["parts"]) for found in (before, after)] == pytest.approx([1, 1])


def test_a_head_that_differs_is_a_table_of_its_own(tmp_path):
    make_base(qwen2_5_vl, tmp_path / "base", True, "different", shards=True)
    folder = pack(tmp_path / "base", tmp_path / "packed", {"tokens": 4, "head": 8})
    parts = anatomy(Checkpoint.open(folder))
    assert parts.packable["lm_head"].tied_to is None
    assert set(Checkpoint.open(folder).packed) == {"lm_head", parts.tokens.name}
    assert bits_of(folder)["tables"]["weights"] == 2 * parts.tokens.size


def test_equal_numbers_of_other_dtypes_are_one_table(tmp_path):
    inputs = make_base(llava, tmp_path / "base", True, "equal")
    (head,) = (name for name in Checkpoint.open(tmp_path / "base").entries if "lm_head" in name)
    change_tensors(tmp_path / "base", lambda tensors: tensors.update({head: tensors[head].float()}))
    assert anatomy(Checkpoint.open(tmp_path / "base")).tokens.copies == (head,)
    folder = pack(tmp_path / "base", tmp_path / "packed", 4)
    assert torch.equal(logits(load(folder, "forward"), inputs), logits(twin(tmp_path / "base", 4), inputs))


def test_a_head_that_differs_is_packed_as_a_linear_layer_beside_a_dense_embedding(tmp_path):
    inputs = make_base(gemma3, tmp_path / "base", True, "different")
    checkpoint = Checkpoint.open(tmp_path / "base")
    head = anatomy(checkpoint).packable["lm_head"]
    weight = grouped.pack(round_to_nearest(checkpoint.read(head.disk_name), 4, 64), torch.bfloat16)
    folder = write_packed_checkpoint(checkpoint, {"lm_head": lambda: weight}, [head], tmp_path / "packed", {})
    for dequantize in ("load", "forward"):
        model = load(folder, dequantize)
        assert torch.equal(logits(model, inputs), logits(twin(tmp_path / "base", "head"), inputs))


def udop():
    """The embedding is tied to those of encoder and decoder, and to the head."""
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "image_size": 32, "patch_size": 16}
    config = UdopConfig(vocab_size=64, max_2d_position_embeddings=64, dropout_rate=0.0, **sizes)
    inputs = {"input_ids": torch.tensor([[10, 11, 12]]), "bbox": torch.rand(1, 3, 4)}
    inputs |= {"pixel_values": torch.randn(1, 3, 32, 32), "decoder_input_ids": torch.tensor([[0, 5, 6]])}
    return config, inputs, {"vision": ["patch_embed"], "language": ["shared", "encoder", "decoder", "lm_head"]}


def blip():
    """The head has a bias, tied as well."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": 64, "encoder_hidden_size": 32, "projection_dim": 16}
    text |= {"bos_token_id": 1, "eos_token_id": 2, "sep_token_id": 3, "pad_token_id": 0}
    config = BlipConfig(text_config=text, vision_config={**sizes, "image_size": 16, "patch_size": 8}, projection_dim=16)
    inputs = {"input_ids": torch.tensor([[10, 11, 12]]), "pixel_values": torch.randn(1, 3, 16, 16)}
    return config, inputs, {"vision": ["vision_model"], "language": ["text_decoder"]}


@pytest.mark.parametrize("on_disk", ["first", "all", "others"])
@pytest.mark.parametrize("build", [udop, blip])
def test_every_tied_pair_of_an_architecture_is_one_tensor(tmp_path, build, on_disk):
    torch.manual_seed(0)
    config, inputs, modules = build()
    inputs["pixel_values"] = inputs["pixel_values"].to(torch.bfloat16)
    made = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    for weight in made.parameters():
        if not weight.any():
            weight.data.normal_(0, 0.1)
    made.save_pretrained(tmp_path / "base")
    file, pairs = tmp_path / "base" / "model.safetensors", made.all_tied_weights_keys
    tensors = {name: tensor.contiguous() for name, tensor in made.state_dict().items() if name not in pairs}
    if on_disk != "first":
        tensors |= {name: tensors[other].clone() for name, other in pairs.items()}
    if on_disk == "others":
        tensors = {name: tensor for name, tensor in tensors.items() if name not in pairs.values()}
    save_file(tensors, file, metadata={"format": "pt"})
    folder = pack(tmp_path / "base", tmp_path / "packed", {"tokens": 4}, modules)
    assert sum(entry.dtype == "U8" for entry in Checkpoint.open(folder).entries.values()) == 1
    assert bits_of(folder)["tables"]["weights"] == 64 * 32
    expected = logits(twin(tmp_path / "base", "tokens"), inputs)
    for dequantize in ("load", "forward"):
        model = load(folder, dequantize)
        assert torch.equal(logits(model, inputs), expected)
        model.save_pretrained(tmp_path / dequantize)
        assert torch.equal(logits(load(tmp_path / dequantize), inputs), expected)
    assert torch.equal(logits(model.dequantize(), inputs), expected)


class TestAnOutputThatDoesNotLoad:
    def test_is_never_put_in_place_and_leaves_the_earlier_one(self, tmp_path):
        make_base(llava, tmp_path / "base", True, "different")
        output = pack(tmp_path / "base", tmp_path / "packed", 4)
        before = (output / "model.safetensors").read_bytes()
        change_tensors(tmp_path / "base", lambda tensors: tensors.pop(NORM))
        with pytest.raises(InputError, match=r"tensor .*norm\.weight is missing"):
            pack(tmp_path / "base", output, 4)
        assert (output / "model.safetensors").read_bytes() == before
        assert not list(tmp_path.glob(".packed*"))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            pytest.param(lambda tensors: tensors.pop(NORM), "is missing", id="missing"),
            pytest.param(
                lambda tensors: tensors.update({NORM: torch.ones(7)}), r".*F32 of shape \(7,\), expected", id="shape"
            ),
        ],
    )
    def test_a_base_that_is_not_whole_is_named(self, tmp_path, change, message):
        make_base(llava, tmp_path / "base", False, "different")
        change_tensors(tmp_path / "base", change)
        with pytest.raises(InputError, match=rf"norm\.weight {message}"):
            check_loads(Checkpoint.open(tmp_path / "base"), tmp_path / "base")
