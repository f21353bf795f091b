"""`from_pretrained` rebuilds exactly what was packed, or says what is wrong."""

import copy
import json
import os
import subprocess
import sys
import weakref

import numpy as np
import pytest
import torch
from changed_files import change_json, change_tensors
from PIL import Image
from raw_codec import TopByte, pack_linears, top_bytes
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor

from bivlm.checkpoint.linears import linears
from bivlm.checkpoint.packed_modules import PackedLinear
from bivlm.checkpoint.reading import Checkpoint
from bivlm.checkpoint.transformers_plugin import BiVLMConfig
from bivlm.checkpoint.writing import write_packed_checkpoint
from bivlm.errors import InputError
from bivlm.methods import method
from bivlm.numerics.weight_statistics import LayerStatistics
from bivlm.packing import container, unpack
from bivlm.recipe.selection import select

A_LAYER = "model.language_model.layers.1.mlp.up_proj"
ITS_TENSOR = "language_model.model.layers.1.mlp.up_proj.weight"


def load(folder, dequantize=None, **options):
    if dequantize is not None:
        options["quantization_config"] = BiVLMConfig(dequantize=dequantize)
    return AutoModelForImageTextToText.from_pretrained(folder, **options)


@pytest.fixture(scope="module")
def inputs(tiny_llava):
    processor = AutoProcessor.from_pretrained(tiny_llava)
    turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]
    prompt = processor.apply_chat_template(turns, add_generation_prompt=True)
    image = Image.effect_noise((40, 30), 90).convert("RGB")
    return processor(images=[image], text=[prompt], return_tensors="pt").to(torch.bfloat16)


@pytest.fixture(scope="module")
def twin(tiny_llava):
    """The base model whose linears but the head hold what the test codec keeps of them."""
    model = load(tiny_llava)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            module.weight.data = top_bytes(module.weight.data)
    return model


@pytest.fixture
def shards(tiny_llava, whole_recipe, tmp_path):
    """The packed checkpoint in several files."""
    base = Checkpoint.open(tiny_llava)
    chosen, _ = select(linears(base), whole_recipe)
    packed = pack_linears(base, chosen)
    folder = write_packed_checkpoint(base, packed, chosen, tmp_path / "shards", {}, max_shard_bytes=60_000)
    assert len(Checkpoint.open(folder).weight_files) > 3
    return folder


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


def packed_layers(model):
    return [name for name, module in model.named_modules() if isinstance(module, PackedLinear)]


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
class TestWhatIsLoaded:
    @pytest.mark.parametrize("dequantize", ["load", "forward"])
    def test_logits_are_those_of_a_model_with_the_rebuilt_weights_bit_for_bit(
        self, packed_llava, twin, inputs, dequantize
    ):
        assert torch.equal(logits(load(packed_llava, dequantize), inputs), logits(twin, inputs))

    @pytest.mark.parametrize("dequantize", ["load", "forward"])
    def test_generate_gives_the_tokens_of_a_model_with_the_rebuilt_weights(
        self, packed_llava, twin, inputs, dequantize
    ):
        options = {"max_new_tokens": 8, "do_sample": False}
        tokens = load(packed_llava, dequantize).generate(**inputs, **options)
        assert torch.equal(tokens, twin.generate(**inputs, **options))

    def test_float32_is_the_rebuilt_weights_widened(self, packed_llava, twin, inputs):
        wide = {**inputs, "pixel_values": inputs["pixel_values"].float()}
        expected = logits(copy.deepcopy(twin).float(), wide)
        assert torch.equal(logits(load(packed_llava, dtype=torch.float32), wide), expected)
        assert torch.equal(logits(load(packed_llava, "forward", dtype=torch.float32), wide), expected)

    def test_the_test_codec_changes_the_logits(self, tiny_llava, twin, inputs):
        assert not torch.equal(logits(load(tiny_llava), inputs), logits(twin, inputs))

    def test_load_leaves_an_ordinary_model(self, packed_llava):
        model = load(packed_llava)
        assert packed_layers(model) == []
        assert not hasattr(model.config, "quantization_config") and not hasattr(model, "hf_quantizer")

    def test_forward_keeps_every_layer_but_the_head_packed(self, packed_llava):
        model = load(packed_llava, "forward")
        assert len(packed_layers(model)) == 28
        assert type(model.lm_head) is nn.Linear

    def test_the_model_config_may_choose_as_well(self, packed_llava):
        config = AutoConfig.from_pretrained(packed_llava)
        config.quantization_config["dequantize"] = "forward"
        assert len(packed_layers(load(packed_llava, config=config))) == 28

    def test_a_packed_model_can_be_dequantized_later(self, packed_llava, twin, inputs):
        model = load(packed_llava, "forward").dequantize()
        assert packed_layers(model) == []
        assert torch.equal(logits(model, inputs), logits(twin, inputs))

    def test_the_base_model_alone_loads_too(self, packed_llava):
        model = AutoModel.from_pretrained(packed_llava, quantization_config=BiVLMConfig(dequantize="forward"))
        assert type(model).__name__ == "LlavaModel" and len(packed_layers(model)) == 28

    def test_nothing_is_reported_missing(self, packed_llava):
        _, info = load(packed_llava, output_loading_info=True)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))

    def test_packed_bytes_are_dropped_layer_by_layer(self, packed_llava, monkeypatch):
        alive, seen = [], []
        dequantized = PackedLinear.dequantized

        def watched(module, dtype=None):
            seen.append(sum(reference() is not None for reference in alive))
            alive.append(weakref.ref(module.weight))
            return dequantized(module, dtype)

        monkeypatch.setattr(PackedLinear, "dequantized", watched)
        load(packed_llava)
        # The layer before is still held by a variable of the loop.
        assert len(seen) == 28 and max(seen) <= 1

    def test_shards_load_as_a_single_file_does(self, shards, twin, inputs):
        assert torch.equal(logits(load(shards), inputs), logits(twin, inputs))


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
class TestSaving:
    def test_a_packed_model_is_saved_packed(self, packed_llava, tmp_path):
        load(packed_llava, "forward").save_pretrained(tmp_path / "again")
        before, after = (load_file(folder / "model.safetensors") for folder in (packed_llava, tmp_path / "again"))
        assert sorted(before) == sorted(after)
        assert all(torch.equal(before[name], after[name]) for name in before)

    def test_what_a_packed_model_saved_loads_again(self, packed_llava, twin, inputs, tmp_path):
        load(packed_llava, "forward").save_pretrained(tmp_path / "again")
        model = load(tmp_path / "again")
        assert len(packed_layers(model)) == 28
        assert torch.equal(logits(model, inputs), logits(twin, inputs))

    def test_a_rebuilt_model_is_saved_as_an_ordinary_one(self, packed_llava, twin, tmp_path):
        load(packed_llava).save_pretrained(tmp_path / "dense")
        assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
        saved = Checkpoint.open(tmp_path / "dense")
        weights = {linear.name: saved.read(linear.disk_name) for linear in linears(saved)}
        assert all(torch.equal(weight, twin.get_submodule(name).weight) for name, weight in weights.items())


def change_quantization(folder, change):
    change_json(folder / "config.json", lambda config: change(config["quantization_config"]))


def flip(tensor, position, bit=1):
    tensor[position] ^= bit


class TestWhatIsRefused:
    @pytest.mark.parametrize("name", [ITS_TENSOR, "language_model.model.norm.weight"])
    def test_a_missing_tensor_is_named(self, packed_llava, name):
        change_tensors(packed_llava, lambda tensors: tensors.pop(name))
        loaded_name = name.replace("language_model.model.", "model.language_model.")
        with pytest.raises(InputError, match=rf"tensor {loaded_name} is missing in model\.safetensors"):
            load(packed_llava)

    def test_a_packed_tensor_of_another_length_than_the_config_says_is_named(self, packed_llava):
        change_tensors(packed_llava, lambda tensors: tensors.update({ITS_TENSOR: tensors[ITS_TENSOR][:-1].clone()}))
        with pytest.raises(InputError, match=rf"{A_LAYER}\.weight .*shape \(8223,\), expected .*\(8224,\)"):
            load(packed_llava)

    def test_a_dense_tensor_where_a_packed_one_should_be_is_named(self, packed_llava):
        dense = torch.zeros(128, 64, dtype=torch.bfloat16)
        change_tensors(packed_llava, lambda tensors: tensors.update({ITS_TENSOR: dense}))
        with pytest.raises(InputError, match=rf"{A_LAYER}\.weight .*BF16 of shape \(128, 64\)"):
            load(packed_llava)

    @pytest.mark.parametrize("dequantize", ["load", "forward"])
    @pytest.mark.parametrize("position", [28, 32, 5000, -1])
    @pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
    def test_a_flipped_bit_is_named(self, packed_llava, position, dequantize):
        change_tensors(packed_llava, lambda tensors: flip(tensors[ITS_TENSOR], position))
        with pytest.raises(InputError, match=rf"{A_LAYER}\.weight"):
            load(packed_llava, dequantize)

    @pytest.mark.parametrize("dequantize", ["load", "forward"])
    @pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
    def test_impossible_contents_with_a_right_checksum_are_named(self, packed_llava, dequantize):
        header = container.read_header(load_file(packed_llava / "model.safetensors")[ITS_TENSOR])
        highest = np.full(header.shape[0] * header.shape[1], 0x7F, np.uint8)  # 1.7e38, which float16 does not hold
        infinite = container.write(header.codec, header.shape, torch.float16, [highest])
        change_tensors(packed_llava, lambda tensors: tensors.update({ITS_TENSOR: infinite}))
        with pytest.raises(InputError, match=rf"{A_LAYER}\.weight: .*infinite in torch.float16"):
            load(packed_llava, dequantize)

    @pytest.mark.parametrize("dequantize", ["load", "forward"])
    @pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
    def test_the_contents_of_every_packed_tensor_are_checked_once(self, packed_llava, dequantize, monkeypatch):
        checked, check = [], TopByte.check

        def counted(self, contents):
            checked.append(contents.name)
            return check(self, contents)

        monkeypatch.setattr(TopByte, "check", counted)
        load(packed_llava, dequantize)
        packed = BiVLMConfig(**json.loads((packed_llava / "config.json").read_text())["quantization_config"]).packed
        assert sorted(checked) == sorted(f"{name}.weight" for name in packed)

    @pytest.mark.parametrize("position", [0, 4, 5, 6, 7, 8, 16, 20, 24])
    def test_a_flipped_bit_in_the_header_is_named(self, packed_llava, position):
        change_tensors(packed_llava, lambda tensors: flip(tensors[ITS_TENSOR], position))
        with pytest.raises(InputError, match=rf"{A_LAYER}\.weight"):
            load(packed_llava)

    def test_an_unknown_version_of_a_packed_tensor_is_named(self, packed_llava):
        change_tensors(packed_llava, lambda tensors: tensors[ITS_TENSOR].__setitem__(4, 2))
        with pytest.raises(InputError, match=rf"{A_LAYER}\.weight: packed format version 2"):
            load(packed_llava)

    def test_an_unknown_version_of_the_checkpoint_is_named(self, packed_llava):
        change_quantization(packed_llava, lambda config: config.update(format=2))
        with pytest.raises(InputError, match="quantization_config: format 2, this code reads 1"):
            load(packed_llava)

    @pytest.mark.parametrize("packed", [{A_LAYER: "8224"}, {A_LAYER: -1}, [A_LAYER]])
    def test_lengths_that_are_none_are_refused(self, packed_llava, packed):
        change_quantization(packed_llava, lambda config: config.update(packed=packed))
        with pytest.raises(InputError, match="expected a byte length by linear"):
            load(packed_llava)
        with pytest.raises(InputError, match="expected a byte length by linear"):
            linears(Checkpoint.open(packed_llava))

    def test_an_unknown_way_to_dequantize_is_named(self, packed_llava):
        change_quantization(packed_llava, lambda config: config.update(dequantize="never"))
        with pytest.raises(InputError, match="dequantize 'never', expected one of 'load', 'forward', 'packed'"):
            load(packed_llava)

    def test_a_packed_layer_that_the_model_does_not_have_is_named(self, packed_llava):
        change_quantization(packed_llava, lambda config: config["packed"].update({"model.nowhere": 10}))
        with pytest.raises(InputError, match=r"has no linear layer or embedding model\.nowhere"):
            load(packed_llava)

    def test_a_packed_layer_that_the_config_forgot_is_not_loaded_as_something_else(self, packed_llava):
        change_quantization(packed_llava, lambda config: config["packed"].pop(A_LAYER))
        with pytest.raises(InputError, match=A_LAYER):
            load(packed_llava)

    @pytest.mark.parametrize("kept", [100, 20_000, -1])
    def test_a_file_cut_short_is_named(self, packed_llava, kept):
        file = packed_llava / "model.safetensors"
        file.write_bytes(file.read_bytes()[:kept])
        with pytest.raises(InputError, match=r"model\.safetensors"):
            load(packed_llava)

    def test_a_shard_that_is_gone_is_named(self, shards):
        shard = sorted(shards.glob("model-00002*"))[0]
        shard.unlink()
        with pytest.raises((InputError, OSError), match=shard.name):
            load(shards)

    def test_a_full_precision_model_is_not_compressed_on_the_fly(self, tiny_llava):
        with pytest.raises(ValueError, match="pre-quantized"):
            load(tiny_llava, "load")

    def test_forgetting_to_import_bivlm_raises(self, packed_llava):
        code = (
            "import sys; from transformers import AutoModelForImageTextToText as Auto; "
            "assert 'bivlm' not in sys.modules; Auto.from_pretrained(sys.argv[1])"
        )
        # Other tests quieten transformers for the whole process; here what it says is the point.
        loud = {name: value for name, value in os.environ.items() if name != "TRANSFORMERS_VERBOSITY"}
        done = subprocess.run(
            [sys.executable, "-c", code, packed_llava], capture_output=True, text=True, check=False, env=loud
        )
        assert done.returncode == 1
        assert "Unknown quantization type, got bivlm" in done.stderr
        assert "RuntimeError" in done.stderr.splitlines()[-1] + done.stderr.splitlines()[-2]


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
def test_a_model_packed_by_the_method_bivlm_rebuilds_its_weights(tiny_llava, whole_recipe, tmp_path, inputs):
    base = Checkpoint.open(tiny_llava)
    chosen, _ = select(linears(base), whole_recipe)
    packed = {}
    for linear in chosen:
        weight, settings = base.read(linear.disk_name), whole_recipe.components[linear.component]
        bivlm = method(settings.method)
        statistics = LayerStatistics.measure(weight, bivlm.tail_share(settings), linear.name)
        packed[linear.name] = bivlm.quantize(weight, bivlm.plan(statistics, settings)).packed
    makers = {name: (lambda tensor=tensor: tensor) for name, tensor in packed.items()}
    folder = write_packed_checkpoint(base, makers, chosen, tmp_path / "packed", {})
    rebuilt = load(tiny_llava)
    for name, tensor in packed.items():
        rebuilt.get_submodule(name).weight.data = unpack(tensor)
    for dequantize in ("load", "forward"):
        assert torch.equal(logits(load(folder, dequantize), inputs), logits(rebuilt, inputs))
