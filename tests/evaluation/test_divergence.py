"""KL to full precision against a direct computation, and what it refuses to compare."""

import copy

import pytest
import torch
from PIL import Image
from safetensors import safe_open

from bivlm.errors import InputError
from bivlm.evaluation.divergence import kl_divergence, reference_logits
from bivlm.evaluation.generation import load_model
from bivlm.sources.replies import MAX_POSITIONS, read_reply
from bivlm.sources.samples import CalibrationSample

SAMPLES = [
    CalibrationSample(Image.effect_noise((32, 32), 60).convert("RGB"), "What is it?", "a cat"),
    CalibrationSample(Image.effect_noise((40, 20), 30).convert("RGB"), "Is it a dog?", "no"),
    CalibrationSample(
        Image.new("RGB", (32, 32), "red"), "Describe.", "a long reply, of more tokens than are ever judged"
    ),
    CalibrationSample(None, "Where do cats live?", "at home"),
]


@pytest.fixture(scope="module")
def loaded(tiny_llava):
    return load_model(tiny_llava, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def changed(loaded):
    """The same model with other attention weights."""
    model = copy.deepcopy(loaded[0])
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "self_attn" in name and name.endswith("weight"):
                weight.mul_(1.5)
    return model


@pytest.fixture(scope="module")
def stored(loaded, tmp_path_factory):
    return reference_logits(*loaded, SAMPLES, tmp_path_factory.mktemp("kl") / "full.safetensors")


@torch.inference_mode()
def _probabilities(model, processor, sample):
    """Rows of probabilities for the reply and the end of the turn; the tiny tokenizer has a token a byte."""
    place = "" if sample.image is None else "<image>\n"
    text = f"USER: {place}{sample.user} ASSISTANT: {sample.assistant}</s>"
    inputs = processor(images=sample.image, text=text, return_tensors="pt")
    reply = len(sample.assistant) + 2  # the space before it, its bytes, </s>
    logits = model(**inputs).logits[0].double()
    return torch.softmax(logits[-reply - 1 : -1], dim=-1)[:MAX_POSITIONS]


def test_the_divergence_is_the_mean_of_p_log_p_over_q(loaded, changed, stored):
    _, processor = loaded
    rows = []
    for sample in SAMPLES:
        p, q = (_probabilities(model, processor, sample) for model in (loaded[0], changed))
        rows.append((p * (p / q).log()).sum(-1))
    expected = torch.cat(rows).mean().item()
    assert expected > 1e-3
    found = kl_divergence(changed, processor, SAMPLES, stored)
    assert found.kl == pytest.approx(expected, rel=1e-2)
    short, long = ([row for row in rows if (len(row) < 8) == few] for few in (True, False))
    assert short and long
    assert found.short == pytest.approx(torch.cat(short).mean().item(), rel=1e-2)
    assert found.long == pytest.approx(torch.cat(long).mean().item(), rel=1e-2)


def test_a_model_diverges_from_itself_by_the_storage_error_alone(loaded, stored):
    assert 0 <= kl_divergence(*loaded, SAMPLES, stored).kl < 1e-6


def test_one_entry_a_conversation_of_at_most_32_positions(stored, loaded):
    with safe_open(stored, "pt") as entries:
        shapes = [tuple(entries.get_slice(f"{i:05d}").get_shape()) for i in range(4)]
    assert shapes == [(rows, 259) for rows in (len(" a cat") + 1, len(" no") + 1, MAX_POSITIONS, len(" at home") + 1)]


def test_the_same_model_gives_the_same_bytes_and_no_litter(loaded, stored, tmp_path):
    again = reference_logits(*loaded, SAMPLES, tmp_path / "again.safetensors")
    assert again.read_bytes() == stored.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["again.safetensors"]


@pytest.mark.parametrize(("index", "said"), [(1, " no</s>"), (3, " at home</s>")])
def test_the_reply_begins_right_after_the_generation_prompt(loaded, index, said):
    reply = read_reply(*loaded, SAMPLES[index])
    tokens = reply.inputs["input_ids"][0, reply.start : reply.start + reply.count]
    assert loaded[1].tokenizer.decode(tokens) == said


def test_a_template_whose_prompt_is_no_beginning_of_the_conversation_is_refused(loaded):
    thinking = copy.copy(loaded[1])
    thinking.chat_template = thinking.chat_template.replace("ASSISTANT:{% endif %}", "ASSISTANT: <think>{% endif %}")
    with pytest.raises(InputError, match=r"chat template of LlavaProcessor: .*<think>"):
        read_reply(loaded[0], thinking, SAMPLES[0])


def test_other_conversations_are_not_compared(loaded, stored):
    with pytest.raises(InputError, match="holds 4 samples, expected the 2"):
        kl_divergence(*loaded, SAMPLES[:2], stored)
    with pytest.raises(InputError, match="sample 0: the model reads other tokens"):
        kl_divergence(*loaded, SAMPLES[::-1], stored)


def test_a_file_of_something_else_is_refused(loaded, tmp_path, tiny_llava):
    (tmp_path / "text").write_text("hello")
    for file in (tmp_path / "text", tmp_path / "missing", tiny_llava / "model.safetensors"):
        with pytest.raises(InputError, match=f"{file}: expected .*log-probabilities"):
            kl_divergence(*loaded, SAMPLES, file)


def test_no_conversation_is_refused(loaded, tmp_path):
    with pytest.raises(InputError, match="found no sample"):
        reference_logits(*loaded, [], tmp_path / "file")


def test_a_model_that_gives_nan_fails_and_leaves_no_file(loaded, tmp_path):
    broken = copy.deepcopy(loaded[0])
    torch.nn.init.constant_(broken.lm_head.weight, float("nan"))
    with pytest.raises(ArithmeticError, match="NaN"):
        reference_logits(broken, loaded[1], SAMPLES, tmp_path / "file")
    assert not list(tmp_path.iterdir())


def test_tokens_that_a_model_rules_out_cost_nothing_unless_full_precision_allows_them(loaded, tmp_path):
    model, processor = loaded
    strict = copy.deepcopy(model)
    head = strict.lm_head = torch.nn.Linear(64, 259).to(strict.device)
    head.weight.data, head.bias.data = model.lm_head.weight.data.clone(), torch.zeros(259)
    head.bias.data[7] = -torch.inf
    stored = reference_logits(strict, processor, SAMPLES, tmp_path / "strict.safetensors")
    assert kl_divergence(strict, processor, SAMPLES, stored).kl < 1e-6
    assert 0 < kl_divergence(model, processor, SAMPLES, stored).kl < 1
    allowing = reference_logits(model, processor, SAMPLES, tmp_path / "all.safetensors")
    with pytest.raises(ArithmeticError, match="KL is infinite"):
        kl_divergence(strict, processor, SAMPLES, allowing)


def test_bfloat16_and_float32_read_the_same_model(tiny_llava, stored):
    half = load_model(tiny_llava, device="cpu", dtype="auto")
    assert half[0].dtype == torch.bfloat16
    assert 0 < kl_divergence(*half, SAMPLES, stored).kl < 1e-3
