"""What a compression will need: figures that follow from shapes, and refusals that say them."""

import json
import re
from dataclasses import replace

import pytest
import torch

from bivlm.checkpoint.linears import Linear
from bivlm.compression import estimate
from bivlm.compression.estimate import Machine, Needs, Probe, Work, check_fits, probe_all
from bivlm.errors import InputError
from bivlm.methods import method
from flows.cli import main as cli
from flows.estimates import estimate_compression

RTN = method("rtn").Settings(method="rtn", bits=2)
GPTQ = method("gptq").Settings(method="gptq", bits=3)
LARGE = Machine(memory=1e15, gpu=None)


def linear(name, shape):
    return Linear(name, f"{name}.weight", "language", shape, torch.bfloat16)


def qwen_7b(settings=RTN, layers=28):
    """The language model's linears, 16-bit tables, and what else there is in round numbers."""
    shapes = {"q_proj": (3584, 3584), "k_proj": (512, 3584), "v_proj": (512, 3584), "o_proj": (3584, 3584)}
    shapes |= {"gate_proj": (18944, 3584), "up_proj": (18944, 3584), "down_proj": (3584, 18944)}
    found = [(linear(f"layers.{n}.{name}", shape), settings) for n in range(layers) for name, shape in shapes.items()]
    weights = sum(each.size for each, _ in found)
    return Work(found, [(152064 * 3584, 4)], 2 * (weights + 1_800_000_000), weights + 1_800_000_000)


def by_stage(stages):
    return {each.stage: each for each in stages}


def test_memory_does_not_grow_with_the_number_of_layers():
    few, many = (by_stage(estimate.estimate(qwen_7b(layers=layers), 2)) for layers in (2, 28))
    assert few["layers"].memory == many["layers"].memory
    assert few["tables"].memory == many["tables"].memory


def test_a_worker_more_is_a_layer_more():
    one, four = (by_stage(estimate.estimate(qwen_7b(), workers))["layers"] for workers in (1, 4))
    assert four.memory == 4 * one.memory == 4 * 8 * 18944 * 3584


def test_a_packed_7b_with_4_bit_tables_is_under_three_gigabytes():
    work = qwen_7b(method("bivlm").Settings(method="bivlm", groups=2, p_max=0.01))
    bits = {key: Probe(2.15, 0.01) for key in probe_all(work.layers)}
    # 6.5 G weights at 2.15 bits, 0.55 G at 4.5; the head and the vision encoder, 1.25 G, stay.
    expected = (6.525e9 * 2.15 + 0.545e9 * 4.6 + 1.255e9 * 16) / 8
    assert by_stage(estimate.estimate(work, 2, bits))["checkpoint"].disk == pytest.approx(expected, rel=0.01)


def test_methods_that_look_at_inputs_hold_a_block_with_its_second_moments():
    work = replace(qwen_7b(GPTQ), samples=64)
    stages = by_stage(estimate.estimate(work, 1))
    block = 4 * (2 * 3584**2 + 2 * 512 * 3584 + 3 * 3584 * 18944)
    moments = 4 * (3 * 3584**2 + 18944**2)
    assert stages["block inputs"].memory == pytest.approx(2 * (block + moments) + 0.3e9)
    assert stages["layers"].memory == 28 * 3584 * 18944 + 2 * 4 * 18944**2
    assert stages["block inputs"].disk > 28 * moments


def test_finishing_and_evaluation_take_the_whole_model():
    work = replace(qwen_7b(), finish=True, answers=10)
    stages = by_stage(estimate.estimate(work, 1))
    assert stages["finishing"].memory > 4 * work.parameters
    tuned = by_stage(estimate.estimate(replace(work, leftovers=10**9), 1))
    assert tuned["finishing"].memory - stages["finishing"].memory > 18e9  # its numbers, gradient, move, two moments
    assert stages["evaluation"].memory > 4 * work.parameters
    assert stages["evaluation"].gpu > 2 * work.parameters
    assert not {"finishing", "evaluation"} & set(by_stage(estimate.estimate(qwen_7b(), 1)))


class TestWhatCannotFit:
    def test_too_little_memory_names_stage_figures_and_ways_out(self, tmp_path):
        stages = [Needs("layers", 3e9, disk=1.0), Needs("evaluation", 30e9)]
        check_fits(stages, Machine(31e9, None), [tmp_path])
        with pytest.raises(InputError, match=r"evaluation: needs about 30\.9 GB of memory, 16\.0 GB are.*--no-ev"):
            check_fits(stages, Machine(16e9, None), [tmp_path])
        with pytest.raises(InputError, match=r"layers: needs about 3\.9 GB of memory, 2\.0 GB are free.*--workers 1"):
            check_fits(stages, Machine(2e9, None), [tmp_path])

    def test_what_runs_on_a_gpu_has_to_fit_there(self, tmp_path):
        stages = [Needs("evaluation", 30e9, gpu=17e9)]
        check_fits(stages, Machine(4e9, 24e9), [tmp_path])
        with pytest.raises(InputError, match=r"needs about 17\.0 GB of GPU memory, 8\.0 GB are free"):
            check_fits(stages, Machine(4e9, 8e9), [tmp_path])

    def test_too_little_disk_names_the_folder(self, tmp_path):
        place = tmp_path / "not" / "there" / "yet"
        with pytest.raises(InputError, match=rf"{re.escape(str(place))}: about 1000000\.0 GB will be written"):
            check_fits([Needs("checkpoint", disk=1e15)], LARGE, [place])
        assert not place.parent.exists()

    def test_a_containers_limit_counts(self, tmp_path, monkeypatch):
        monkeypatch.setattr(estimate, "_CGROUP", tmp_path)
        whole = Machine.here().memory
        (tmp_path / "memory.max").write_text("2000000000\n")
        (tmp_path / "memory.current").write_text("500000000\n")
        assert Machine.here().memory == 1.5e9 < whole
        (tmp_path / "memory.max").write_text("max\n")
        assert Machine.here().memory > 1.5e9


def test_a_probe_says_what_the_method_stores_here():
    probes = probe_all([(linear("a", (8, 8)), RTN), (linear("b", (8, 8)), RTN), (linear("c", (8, 8)), GPTQ)])
    rtn, gptq = probes.values()
    assert rtn.stored_bits == pytest.approx(2 + (16 + 2) / 128, rel=0.01)  # a scale and a zero point a group
    assert gptq.stored_bits == pytest.approx(3 + (16 + 3) / 64, rel=0.01)
    assert min(rtn.seconds, gptq.seconds) > 0


@pytest.fixture
def recipe_file(tmp_path):
    components = {"language": {"method": "rtn"}, "vision": {"method": "gptq"}}
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps({"name": "r", "format": 1, "components": components, "tables": 4}))
    return path


def test_an_estimate_tells_every_stage_and_writes_nothing(tiny_llava, recipe_file, tmp_path):
    place = {"workspace": str(tmp_path / "work")}
    found = estimate_compression(str(tiny_llava), str(recipe_file), str(tmp_path / "out"), **place)
    assert [each["stage"] for each in found["stages"]] == [
        *("block inputs", "layers", "tables", "checkpoint", "registration"),
    ]
    assert found["refused"] is None
    assert found["memory"] > max(each["memory"] for each in found["stages"])
    assert not (tmp_path / "out").exists()


def test_the_command_prints_it_and_refuses_what_does_not_fit(tiny_llava, recipe_file, tmp_path, monkeypatch, capsys):
    asked = ["compress", "--model", str(tiny_llava), "--recipe", str(recipe_file), "--output", str(tmp_path / "out")]
    asked += ["--workspace", str(tmp_path / "work"), "--no-evaluate"]
    assert cli.main([*asked, "--estimate"]) == cli.DONE
    assert "block inputs" in capsys.readouterr().out
    monkeypatch.setattr(Machine, "here", classmethod(lambda cls: Machine(1e6, None)))
    assert cli.main([*asked, "--estimate"]) == cli.BAD_INPUT
    assert "It does not fit: block inputs: needs about" in capsys.readouterr().out
