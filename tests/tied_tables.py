"""Tiny models with an embedding and a head that may be one tensor, and their tables packed."""

import json
import shutil

import torch
from changed_files import change_json
from safetensors.torch import load_file, save_file
from tiny_families import make_tiny
from transformers import AutoModelForImageTextToText

from bivlm.checkpoint.linears import anatomy
from bivlm.checkpoint.reading import TABLES_KEY, Checkpoint
from bivlm.checkpoint.transformers_plugin import BiVLMConfig
from bivlm.checkpoint.writing import write_packed_checkpoint
from bivlm.compression.embeddings import chosen_tables, pack_table
from bivlm.recipe.loading import parse_recipe


def make_base(build, folder, tie, head, shards=False):
    """A tiny model whose config says `tie`, with the tensors that `head` says, and inputs for it."""
    untied = folder.with_name("untied")
    config, inputs, image_tokens = build()
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = False
    inputs = make_tiny(lambda: (config, inputs, image_tokens), untied)
    shutil.copytree(untied, folder)
    for part in (lambda config: config, lambda config: config["text_config"]):
        change_json(folder / "config.json", lambda config, part=part: part(config).update(tie_word_embeddings=tie))
    tensors = load_file(folder / "model.safetensors")
    (its_head,) = (name for name in tensors if "lm_head" in name)
    (embedding,) = (name for name in tensors if "embed_tokens" in name)
    if head == "absent":
        del tensors[its_head]
    elif head == "equal":
        tensors[its_head] = tensors[embedding].clone()
    elif head == "alone":
        del tensors[embedding]
    (folder / "model.safetensors").unlink()
    if shards:  # the head is in another file than the embedding
        weight_map = {name: f"model-0000{1 + (name == its_head)}-of-00002.safetensors" for name in tensors}
        for file in set(weight_map.values()):
            inside = {name: tensor for name, tensor in tensors.items() if weight_map[name] == file}
            save_file(inside, folder / file, metadata={"format": "pt"})
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    else:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return inputs


def pack(base, output, tables, modules=None):
    """Pack the tables that the recipe says, and nothing else."""
    said = {"name": "r", "format": 1, "components": {"language": {"method": "rtn", "bits": 4}}}
    settings = parse_recipe(said | ({"tables": tables} if tables else {})).tables
    checkpoint = Checkpoint.open(base, modules)
    chosen, files = chosen_tables(anatomy(checkpoint), settings, []), {}
    for number, (linear, how) in enumerate(chosen):
        files[linear.name] = output.with_name(f"table-{number}")
        pack_table(checkpoint.entries[linear.disk_name], how, files[linear.name])
    linears = [linear for linear, _ in chosen]
    return write_packed_checkpoint(checkpoint, files, linears, output, {TABLES_KEY: list(files)})


def load(folder, dequantize=None):
    asked = {"quantization_config": BiVLMConfig(dequantize=dequantize)} if dequantize else {}
    return AutoModelForImageTextToText.from_pretrained(folder, **asked)


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits
