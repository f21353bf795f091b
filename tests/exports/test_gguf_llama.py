"""llama.cpp computes with the exported files what transformers computes with the packed checkpoint.

Needs llama_cpp (llama-cpp-python 0.3.36), which brings a compiled llama.cpp: in this environment, or in that of the
interpreter which BIVLM_LLAMA_PYTHON names.

llama.cpp rounds what it multiplies quantized weights with to 8 bits. So the same files are also compared with all
tensors decoded to float32: logits are then the same to the last bits, features but for its tables in float16.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from exportable import FAMILIES, MEAN, STD, llama_clip, make, qwen2_5_vl, qwen2_siglip
from gguf import GGUFReader, GGUFValueType, GGUFWriter
from gguf.quants import dequantize
from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers
from transformers import AutoModelForImageTextToText, AutoTokenizer, PreTrainedTokenizerFast

from bivlm.exports.gguf import MMPROJ, MODEL, export_gguf
from bivlm.reference.question_sets import questions_alone

PYTHON = os.environ.get("BIVLM_LLAMA_PYTHON") or (sys.executable if importlib.util.find_spec("llama_cpp") else None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        PYTHON is None, reason="llama_cpp is not installed, and BIVLM_LLAMA_PYTHON names no interpreter"
    ),
]
IDS = [[number * 37 % 900 + 10 for number in range(24)]]
IMAGE_SIZE = {llama_clip: 64, qwen2_siglip: 64, qwen2_5_vl: 224}
PATCH = 14  # of Qwen2.5-VL


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda build: build.__name__)
def both(request, tmp_path_factory):
    """The family, and answers of transformers, llama.cpp, and llama.cpp with float32 tensors: logits and features."""
    build, folder = request.param, tmp_path_factory.mktemp("llama")
    packed = make(build, folder)
    export_gguf(packed, folder / "out")
    (folder / "float32").mkdir()
    for file in (MODEL, MMPROJ):
        as_float32(folder / "out" / file, folder / "float32" / file)
    side = IMAGE_SIZE[build]
    image = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    np.save(folder / "image.npy", image)
    answers = [llama(folder / out, folder / "image.npy") for out in ("out", "float32")]
    return build, transformers_answer(build, packed, image), *answers


def as_float32(file, other):
    """Write a GGUF file again with every tensor decoded by the gguf package, and rounded as the checkpoint's are."""
    reader = GGUFReader(file)
    writer = GGUFWriter(other, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            kind = field.types[0]
            inner = field.types[-1] if kind == GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), kind, inner)
    for tensor in reader.tensors:
        numbers = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
        shape = [int(size) for size in reversed(tensor.shape)]
        writer.add_tensor(tensor.name, numbers.bfloat16().float().numpy().reshape(shape))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def ask(request):
    program = Path(__file__).with_name("llama_program.py")
    done = subprocess.run([PYTHON, program], input=json.dumps(request), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def llama(out, image):
    request = {"model": str(out / MODEL), "texts": [], "ids": IDS[0], "logits": str(out / "logits.npy")}
    request |= {"mmproj": str(out / MMPROJ), "image": str(image), "embedded": str(out / "embedded.npy")}
    ask(request)
    return np.load(out / "logits.npy"), np.load(out / "embedded.npy")


def transformers_answer(build, packed, image):
    """Logits of text and the projector's output for an image, both in float32."""
    model = AutoModelForImageTextToText.from_pretrained(packed, dtype=torch.float32).eval()
    if build is llama_clip:
        class_token_last(model.model.vision_tower.embeddings)
    pixels = torch.from_numpy(((image / 255 - MEAN) / STD).transpose(2, 0, 1)).float()
    with torch.no_grad():
        logits = model(input_ids=torch.tensor(IDS)).logits[0]
        if build is qwen2_5_vl:
            grid = torch.tensor([[1, pixels.shape[1] // PATCH, pixels.shape[2] // PATCH]])
            features = model.model.get_image_features(patches(pixels), image_grid_thw=grid)
        else:
            features = model.model.get_image_features(pixels[None])
    return logits.numpy(), torch.cat(list(features.pooler_output)).view(-1, 256).numpy()


def class_token_last(embeddings):
    """Order tokens as llama.cpp does, which then leaves out the first of them, a patch: a fault of its release."""

    def forward(pixel_values, **_):
        patches = embeddings.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
        tokens = torch.cat([patches, embeddings.class_embedding.expand(1, 1, -1)], 1)
        return tokens + embeddings.position_embedding.weight

    embeddings.forward = forward


def patches(pixels):
    """Cut an image as Qwen2.5-VL's processor does: twice the same frame, 2 x 2 patches after one another."""
    across = pixels.shape[-1] // PATCH // 2
    cut = pixels.expand(2, *pixels.shape).reshape(2, 3, across, 2, PATCH, across, 2, PATCH)
    return cut.permute(2, 5, 3, 6, 1, 0, 4, 7).reshape(4 * across**2, -1)


def relative(found, expected):
    """Root of the mean square difference, relative to the standard deviation of what was expected."""
    return float(np.sqrt(np.mean((found - expected) ** 2)) / expected.std())


def test_logits_are_transformers(both, capsys):
    build, (expected, _), (found, _), (in_float32, _) = both
    with capsys.disabled():
        print(f"\nlogits: {relative(found, expected):.2e}, of float32 tensors {relative(in_float32, expected):.2e}")
    # Of Qwen2.5-VL llama.cpp reads no epsilon of the norms and takes 0.
    assert relative(in_float32, expected) < (1e-3 if build is qwen2_5_vl else 5e-6)
    assert np.array_equal(in_float32.argmax(-1), expected.argmax(-1))
    assert relative(found, expected) < 0.1
    assert np.mean(found.argmax(-1) == expected.argmax(-1)) > 0.8


def test_features_of_an_image_are_transformers(both, capsys):
    _, (_, expected), (_, found), (_, in_float32) = both
    with capsys.disabled():
        print(f"\nfeatures: {relative(found, expected):.2e}, of float32 tensors {relative(in_float32, expected):.2e}")
    assert found.shape == expected.shape
    assert relative(in_float32, expected) < 1e-3
    assert relative(found, expected) < 0.1


def test_tokens_of_the_reference_models_questions_are_its_tokenizers(tmp_path):
    packed = make(qwen2_siglip, tmp_path)
    export_gguf(packed, tmp_path / "out")
    texts = [question.text for name in ("perception", "cognition", "choice", "open") for question in asked(name)]
    texts += [
        "Apple\nA.\nB. 12 blue, green.\nAnt\nD.x  two  spaces\t\n\n end ",
        "it's 12345... é日本",
        " USER: x ASSISTANT:",
    ]
    check_tokens(packed, tmp_path / "out", texts)


def asked(name):
    return questions_alone(name)[:300]


def check_tokens(packed, out, texts):
    tokenizer = AutoTokenizer.from_pretrained(packed)
    found = ask({"model": str(out / MODEL), "texts": texts})["tokens"]
    for text, tokens in zip(texts, found, strict=True):
        assert tokens == tokenizer(text, add_special_tokens=False)["input_ids"], text


CORPUS = [
    "The quick brown fox jumps over the lazy dog; it's 12,345.67 times as quick.",
    "def f(x):\n    return x ** 2  # squared\n\n\nprint(f(3))",
    "Größe über Maß, naïve café, 日本語のテキスト, русский текст, 😀",
    "  leading and trailing  \n\t tabs\tand   spaces ",
]
QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def qwen_like():
    from tokenizers import Regex, pre_tokenizers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return tokenizer, {"special_tokens": ["<pad>", "</s>", "<image>"], "initial_alphabet": alphabet}


def gpt2_like():
    from tokenizers import pre_tokenizers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return tokenizer, {"special_tokens": ["<pad>", "</s>", "<image>"], "initial_alphabet": alphabet}


def llama_like():
    """As Llama 2's and LLaVA 1.5's: spaces as U+2581, bytes for what has no letter."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<pad>", "</s>", "<image>", "<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    return tokenizer, {"special_tokens": special, "limit_alphabet": 60}


@pytest.mark.parametrize("kind", [qwen_like, gpt2_like, llama_like])
def test_tokens_are_those_of_tokenizers_as_published_models_have_them(tmp_path, kind):
    packed = make(qwen2_siglip, tmp_path)
    tokenizer, options = kind()
    tokenizer.train_from_iterator(CORPUS * 3, trainers.BpeTrainer(vocab_size=900, show_progress=False, **options))
    if kind is llama_like:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 4)])
    whole = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", extra_special_tokens={"image_token": "<image>"}
    )
    whole.save_pretrained(packed)
    if kind is llama_like:  # bytes are no added tokens in published files
        said = json.loads((packed / "tokenizer.json").read_text())
        said["added_tokens"] = [each for each in said["added_tokens"] if not each["content"].startswith("<0x")]
        (packed / "tokenizer.json").write_text(json.dumps(said))
    export_gguf(packed, tmp_path / "out")
    check_tokens(packed, tmp_path / "out", [*CORPUS, "Unseen words: xylophone & zebra 2024!", "<image>\nWhat?</s>"])
