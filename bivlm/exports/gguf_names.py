"""Which tensors of GGUF files a model's parameters become: names, rows and order.

The language model goes into one file, vision and adaptor into another. Names of parameters are those in the loaded
model. Sources: llama.cpp's ``conversion/`` (text, Qwen2.5-VL) and
``tools/mtmd/legacy-models/convert_image_encoder_to_gguf.py`` with ``tools/mtmd/clip-impl.h`` (LLaVA).
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from bivlm.errors import InputError

TABLES = ("token_embd.weight", "output.weight")  # the embedding of tokens and the head
_HEAD, _TEXT, _TOWER, _QWEN_TOWER = "lm_head.", "model.language_model.", "model.vision_tower.", "model.visual."
_LARGEST_BLOCK = 256  # columns

_TEXT_NAMES = {"embed_tokens.weight": "token_embd.weight", "norm.weight": "output_norm.weight"}
_TEXT_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_LLAVA_NAMES = {
    f"{_TOWER}embeddings.class_embedding": "v.class_embd",
    f"{_TOWER}embeddings.patch_embedding.weight": "v.patch_embd.weight",
    f"{_TOWER}embeddings.patch_embedding.bias": "v.patch_embd.bias",
    f"{_TOWER}embeddings.position_embedding.weight": "v.position_embd.weight",
    f"{_TOWER}pre_layrnorm.weight": "v.pre_ln.weight",
    f"{_TOWER}pre_layrnorm.bias": "v.pre_ln.bias",
    **{
        f"model.multi_modal_projector.linear_{number}.{kind}": f"mm.{2 * number - 2}.{kind}"
        for number in (1, 2)
        for kind in ("weight", "bias")
    },
}
_LLAVA_LAYER = {
    "layer_norm1": "ln1",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.out_proj": "attn_out",
    "layer_norm2": "ln2",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
}
_QWEN_NAMES = {
    "merger.ln_q.weight": "v.post_ln.weight",
    **{f"merger.mlp.{number}.{kind}": f"mm.{number}.{kind}" for number in (0, 2) for kind in ("weight", "bias")},
}
_QWEN_LAYER = {
    "norm1": "ln1",
    "attn.proj": "attn_out",
    "norm2": "ln2",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
# Of the towers of CLIP and SigLIP, what LLaVA's features do not go through.
_UNUSED = re.compile(r"model\.vision_tower\.(post_layernorm|head)\.")
_LAYER = re.compile(r"(?:encoder\.layers|layers|blocks)\.(\d+)\.(.+)\.(weight|bias)")


@dataclass(frozen=True)
class Part:
    """A tensor of a GGUF file.

    Attributes:
        name: in the file.
        parameter: the parameter of the loaded model that it is, or is a part of.
        rows: numbers of the parameter's rows, int64 (m,), in the order of the file; None for all as they are.
        frame: of a kernel (D, channels, frames, height, width), the frame that it is; None for the whole.
        more: how many rows of zeros, and columns of any numbers, the file has behind those of the parameter.
    """

    name: str
    parameter: str
    rows: np.ndarray | None = None
    frame: int | None = None
    more: tuple[int, int] = (0, 0)


def text_parts(config: Any, parameters: Iterable[str]) -> list[Part]:
    """Return the tensors of the language model's file, of a model with this config.

    Raises `InputError` naming a parameter of the language model that has no place in the file.
    """
    parts = []
    for parameter in parameters:
        if parameter.startswith(_HEAD):
            parts.append(Part(f"output.{parameter.removeprefix(_HEAD)}", parameter))
        elif parameter.startswith(_TEXT):
            name = _name(parameter.removeprefix(_TEXT), _TEXT_NAMES, _TEXT_LAYER, "blk")
            if name is None:
                raise _no_place(parameter)
            parts.append(Part(name, parameter, _rope_order(name, config.text_config)))
    return _ordered(parts)


def vision_parts(config: Any, parameters: Iterable[str], packed: Container[str]) -> list[Part]:
    """Return the tensors of the file of vision and adaptor, of a model with this config; raises as `text_parts`.

    `packed` are the names of linear layers that have to be cut into blocks.
    """
    parts = []
    for parameter in parameters:
        if not parameter.startswith((_TEXT, _HEAD)):
            qwen = config.model_type == "qwen2_5_vl"
            parts += _qwen(parameter, config, packed) if qwen else _llava(parameter, config)
    return _ordered(parts)


def blocks_used(config: Any) -> int:
    """Return how many blocks of a LLaVA's tower its features go through."""
    layer, count = config.vision_feature_layer, config.vision_config.num_hidden_layers
    return layer if layer >= 0 else count + 1 + layer


def _llava(parameter: str, config: Any) -> list[Part]:
    inner = parameter.removeprefix(_TOWER)
    found = _LAYER.fullmatch(inner)
    if _UNUSED.match(parameter) or (found and int(found[1]) >= blocks_used(config)):
        return []
    name = _name(inner, {}, _LLAVA_LAYER, "v.blk") or _LLAVA_NAMES.get(parameter)
    if name is None:
        raise _no_place(parameter)
    return [Part(name, parameter)]


def _qwen(parameter: str, config: Any, packed: Container[str]) -> list[Part]:
    inner = parameter.removeprefix(_QWEN_TOWER)
    if inner == "patch_embed.proj.weight":  # a kernel over two frames, as two kernels
        names = ("v.patch_embd.weight", "v.patch_embd.weight.1")
        return [Part(name, parameter, frame=frame) for frame, name in enumerate(names)]
    found = _LAYER.fullmatch(inner)
    if found and found[2] == "attn.qkv":
        rows = np.arange(3 * config.vision_config.hidden_size).reshape(3, -1)
        each = zip("qkv", rows, strict=True)
        return [Part(f"v.blk.{found[1]}.attn_{kind}.{found[3]}", parameter, of_one) for kind, of_one in each]
    name = _name(inner, _QWEN_NAMES, _QWEN_LAYER, "v.blk")
    if name is None:
        raise _no_place(parameter)
    more = (0, 0)
    if found and found[2].startswith("mlp.") and f"{_QWEN_TOWER}blocks.{found[1]}.mlp.down_proj" in packed:
        more = _more_neurons(found[2], found[3], config.vision_config.intermediate_size)
    return [Part(name, parameter, more=more)]


def _more_neurons(layer: str, kind: str, size: int) -> tuple[int, int]:
    """Return rows and columns to put behind those of a feed-forward layer, so that its neurons come in whole blocks.

    Qwen2.5-VL's towers have 3,420, which no block divides. Neurons with gates and inputs of zero give zeros, whatever
    their outputs are multiplied with.
    """
    missing = -size % _LARGEST_BLOCK
    if layer == "mlp.down_proj":
        return (0, missing if kind == "weight" else 0)
    return (missing, 0)


def _name(inner: str, names: dict[str, str], layer: dict[str, str], prefix: str) -> str | None:
    found = _LAYER.fullmatch(inner)
    if found is None:
        return names.get(inner)
    return f"{prefix}.{found[1]}.{layer[found[2]]}.{found[3]}" if found[2] in layer else None


def _rope_order(name: str, text: Any) -> np.ndarray | None:
    """Return the order of a query's or key's rows in which llama.cpp rotates Llama: pairs of a head side by side.

    transformers rotates row i of a head with row i + half; llama.cpp's Llama rotates rows 2 i and 2 i + 1.
    """
    kind = name.split(".")[-2]
    if text.model_type != "llama" or kind not in ("attn_q", "attn_k"):
        return None
    heads = text.num_attention_heads if kind == "attn_q" else text.num_key_value_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return np.arange(heads * head_dim).reshape(heads, 2, head_dim // 2).swapaxes(1, 2).reshape(-1)


def _ordered(parts: list[Part]) -> list[Part]:
    """Return the parts by name, numbers by value: layer 2 before layer 10."""
    return sorted(
        parts,
        key=lambda part: [
            (not word.isdigit(), int(word) if word.isdigit() else 0, word) for word in part.name.split(".")
        ],
    )


def _no_place(parameter: str) -> InputError:
    return InputError(
        f"{parameter}: llama.cpp has no place for it; expected a Llama, Qwen2 or Qwen2.5-VL with biases "
        "and norms as its authors publish it"
    )
