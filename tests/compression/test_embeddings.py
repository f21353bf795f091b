"""The embedding of tokens and the head at 8 or 4 bits: the same bytes as in one piece, and what loads from them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny_families import MROPE, TEXT, make_tiny, qwen2_5_vl, qwen_inputs
from tiny_llava import make_tiny_llava
from transformers import AutoModelForImageTextToText, Qwen2_5_VLConfig

from bivlm.checkpoint.linears import anatomy
from bivlm.checkpoint.reading import TABLES_KEY, Checkpoint
from bivlm.checkpoint.safetensors_file import read_entries, tensor_rows
from bivlm.checkpoint.transformers_plugin import BiVLMConfig
from bivlm.checkpoint.writing import write_packed_checkpoint
from bivlm.compression import embeddings as tables
from bivlm.compression.embeddings import chosen_tables, pack_table
from bivlm.errors import InputError
from bivlm.numerics.uniform_grid import round_to_nearest
from bivlm.packing import grouped, unpack, unpack_rows
from bivlm.recipe.embeddings import EmbeddingSettings
from bivlm.recipe.loading import parse_recipe
from bivlm.reports.bits import bits_of
from bivlm.reports.inspection import inspect

LANGUAGE = {"language": {"method": "rtn", "bits": 4}}


def recipe(**further):
    return parse_recipe({"name": "r", "format": 1, "components": LANGUAGE, **further})


def tied_qwen():
    """Qwen2.5-VL 3B has the head and the embedding in one tensor."""
    config, _, image_tokens = qwen2_5_vl()
    both = Qwen2_5_VLConfig(
        vision_config=config.vision_config.to_dict(),
        text_config={**TEXT, "rope_parameters": MROPE, "tie_word_embeddings": True},
        image_token_id=config.image_token_id,
        video_token_id=config.video_token_id,
        tie_word_embeddings=True,
    )
    return both, qwen_inputs(), image_tokens


@pytest.fixture(scope="module", params=[tied_qwen, qwen2_5_vl], ids=["tied", "apart"])
def packed(request, tmp_path_factory):
    """(base folder, packed folder, inputs) of a tiny model whose tables, and nothing else, are packed at 4 bits."""
    base = tmp_path_factory.mktemp("tables") / "base"
    inputs = make_tiny(request.param, base)
    checkpoint = Checkpoint.open(base)
    files, chosen = {}, chosen_tables(anatomy(checkpoint), recipe(tables=4).tables, [])
    for number, (linear, settings) in enumerate(chosen):
        files[linear.name] = base.parent / str(number)
        pack_table(checkpoint.entries[linear.disk_name], settings, files[linear.name])
    linears = [linear for linear, _ in chosen]
    folder = write_packed_checkpoint(checkpoint, files, linears, base.with_name("packed"), {TABLES_KEY: list(files)})
    return base, folder, inputs


def test_a_table_in_pieces_has_the_bytes_of_the_whole(tiny_llava, tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "PIECE_WEIGHTS", 100)
    checkpoint = Checkpoint.open(tiny_llava)
    entry = checkpoint.entries[anatomy(checkpoint).tokens.disk_name]
    weight = checkpoint.read(entry.name)
    for bits, group_size in ((4, 16), (8, 0), (4, 7)):
        record = pack_table(entry, EmbeddingSettings(bits=bits, group_size=group_size), tmp_path / "table")
        whole = grouped.pack(round_to_nearest(weight, bits, group_size), weight.dtype)
        assert torch.equal(torch.from_numpy(np.fromfile(tmp_path / "table", np.uint8)), whole)
        lost = (weight.double() - unpack(whole).double()).square().sum() / weight.double().square().sum()
        assert record.error == pytest.approx(float(lost), rel=1e-5)
        assert record.bits.stored == 8 * len(whole) / weight.numel()


@pytest.mark.parametrize("columns", [8, 21, 64])
def test_rows_are_those_of_the_whole_weight(columns):
    weight = torch.randn(40, columns, generator=torch.Generator().manual_seed(columns)).to(torch.bfloat16)
    rows = torch.tensor([3, 39, 3, 0])
    for bits in grouped.BITS:
        scales = grouped.stored_channel_scales(torch.rand(columns) + 0.5)
        for channels in (None, scales):
            whole = grouped.pack(round_to_nearest(weight, bits, 8), weight.dtype, channels)
            assert torch.equal(unpack_rows(whole, rows), unpack(whole)[rows])


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
@pytest.mark.parametrize("dequantize", ["load", "forward"])
def test_a_model_with_packed_tables_computes_what_their_rebuilt_weights_do(packed, dequantize, tmp_path):
    base, folder, inputs = packed
    twin = AutoModelForImageTextToText.from_pretrained(base)
    for weight in {twin.get_input_embeddings().weight, twin.get_output_embeddings().weight}:  # one, if it is tied
        weight.data = unpack(grouped.pack(round_to_nearest(weight.data, 4, 64), torch.bfloat16))
    asked = BiVLMConfig(dequantize=dequantize)
    model = AutoModelForImageTextToText.from_pretrained(folder, quantization_config=asked)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, twin(**inputs).logits)
        said = [each.generate(**inputs, max_new_tokens=4, do_sample=False) for each in (model, twin)]
    assert torch.equal(*said)
    model.save_pretrained(tmp_path / "again")
    again = Checkpoint.open(tmp_path / "again")
    assert list(again.entries) == list(Checkpoint.open(folder if dequantize == "forward" else base).entries)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "again")
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, twin(**inputs).logits)


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
def test_packed_tables_are_rebuilt_in_the_dtype_that_the_model_is_loaded_in(packed):
    _, folder, inputs = packed
    inputs = {**inputs, "pixel_values": inputs["pixel_values"].float()}
    logits = []
    for dequantize in ("load", "forward"):
        asked = BiVLMConfig(dequantize=dequantize)
        model = AutoModelForImageTextToText.from_pretrained(folder, quantization_config=asked, dtype=torch.float32)
        with torch.no_grad():
            logits.append(model(**inputs).logits)
    assert logits[0].dtype == torch.float32
    assert torch.equal(*logits)


def test_a_tied_pair_is_stored_once_and_both_are_counted(packed):
    base, folder, _ = packed
    bits, parts = bits_of(folder), anatomy(Checkpoint.open(base))
    tied = parts.linears[-1].tied_to is not None
    assert bits["linears"] is None
    assert bits["tables"]["weights"] == parts.tokens.size * (1 if tied else 2)
    assert bits["model"]["weights"] == bits_of(base)["model"]["weights"]
    size = sum(entry.nbytes for entry in Checkpoint.open(folder).entries.values() if entry.dtype == "U8")
    assert 8 * size < bits["tables"]["stored"] * bits["tables"]["weights"] < 8 * (size + 400)


def test_an_inspection_counts_packed_tables_as_what_they_rebuild(packed):
    base, folder, _ = packed
    before, after = inspect(base), inspect(folder)
    assert after["parameters"] == before["parameters"]
    assert sum(part["share"] for part in after["parts"]) == pytest.approx(1)
    (row,) = (part for part in after["parts"] if part["kind"] == "Embedding" and part["component"] == "language")
    assert (row["state"], row["parameters"]) == ("packed", anatomy(Checkpoint.open(base)).tokens.size)
    head = next(linear for linear in after["linears"] if linear["name"] == "lm_head")
    assert head["packed"]
    assert head["std"] == pytest.approx(next(e for e in before["linears"] if e["name"] == "lm_head")["std"], rel=0.1)


class TestWhatIsRefused:
    def test_a_head_that_is_compressed_as_a_layer_too(self, tiny_llava):
        parts = anatomy(Checkpoint.open(tiny_llava))
        with pytest.raises(InputError, match=r"tables\.head: lm_head is compressed as a linear layer, too"):
            chosen_tables(parts, recipe(tables=4).tables, parts.linears)

    @pytest.mark.parametrize("said", [{"head": 4}, {"tokens": 8, "head": 4}])
    def test_a_head_of_its_own_where_it_shares_the_tensor(self, tmp_path, said):
        make_tiny(tied_qwen, tmp_path / "base")
        parts = anatomy(Checkpoint.open(tmp_path / "base"))
        with pytest.raises(InputError, match=r"tables\.head: lm_head shares its tensor with .*embed_tokens\.weight"):
            chosen_tables(parts, recipe(tables=said).tables, [])

    @pytest.mark.parametrize("said", [3, {}, {"tokens": 2}, {"tokens": {"bits": 4, "groups": 3}}, "4"])
    def test_settings_that_are_none(self, said):
        with pytest.raises(InputError, match="tables"):
            recipe(tables=said)

    @pytest.mark.parametrize("value", [torch.nan, -torch.inf])
    def test_weights_that_are_not_finite(self, tmp_path, value):
        folder = make_tiny_llava(tmp_path / "base")
        checkpoint = Checkpoint.open(folder)
        entry = checkpoint.entries[anatomy(checkpoint).tokens.disk_name]
        overwrite(entry, value)
        with pytest.raises(InputError, match=rf"{entry.name}: has NaN or infinite weights"):
            pack_table(entry, EmbeddingSettings(bits=4), tmp_path / "table")

    def test_a_table_that_has_changed(self, tiny_llava, tmp_path):
        checkpoint = Checkpoint.open(tiny_llava)
        entry = checkpoint.entries[anatomy(checkpoint).tokens.disk_name]
        with pytest.raises(InputError, match=r"other bytes than when the checkpoint was opened"):
            pack_table(entry, EmbeddingSettings(bits=4), tmp_path / "table", "0" * 64)
        assert not (tmp_path / "table").exists()


def test_a_table_whose_rebuilt_rows_are_not_finite_is_refused_by_name(tmp_path):
    table = torch.linspace(-60000, 65504, 32).repeat(12, 1).to(torch.float16)
    save_file({"embed.weight": table}, tmp_path / "model.safetensors")
    (entry,) = read_entries(tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"embed.weight, packed at 4 bits: .*infinite in torch.float16"):
        pack_table(entry, EmbeddingSettings(bits=4), tmp_path / "table")


def test_rows_are_read_in_order_and_checked(tiny_llava):
    checkpoint = Checkpoint.open(tiny_llava)
    sums = checkpoint.digests().tensors
    for entry in checkpoint.entries.values():
        if len(entry.shape) == 2:
            read = torch.cat([piece.clone() for piece in tensor_rows(entry, 7, sums[entry.name])])
            assert torch.equal(read, checkpoint.read(entry.name))


def overwrite(entry, value: float) -> None:
    """Put `value` in the table's last place but two."""
    raw = torch.tensor([value], dtype=torch.bfloat16).view(torch.uint8).numpy().tobytes()
    with Path(entry.file).open("r+b") as stream:
        stream.seek(entry.begin + entry.nbytes - 6)
        stream.write(raw)
