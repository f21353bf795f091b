"""Dropping tokens gives the logits of a model that is told not to look at them."""

import pytest
import torch
from masked_twin import masked
from tiny_prunable import FAMILIES, IMAGE, SHUFFLED, llava, llava_onevision, make, mllama, qwen2_5_vl

from bivlm.pruning.anatomy import anatomy
from bivlm.pruning.dropping import pruned
from bivlm.recipe.pruning import PruningSettings

PLACES = {
    "vision": {"place": "vision", "layer": 2, "share": 0.5},
    "input": {"place": "input", "share": 0.5, "score": "divprune"},
    "language": {"place": "language", "layer": 2, "share": 0.5},
    "mass": {"place": "language", "layer": 2, "mass": 0.6},
    "text": {"place": "text", "layer": 2, "share": 0.5},
    "joint": {"place": "joint", "layer": 2, "share": 0.4},
}
CASES = [
    (build, batch, name)
    for build in FAMILIES
    for batch in ((1, 4) if build in (llava, llava_onevision, qwen2_5_vl, mllama) else (4,))
    for name in PLACES
    if build not in SHUFFLED or name not in ("vision", "joint")  # which are refused
]
NEW_TOKENS = 4


def twin(model, kept, settings):
    """What every layer must not look at, from what was kept in the end: nothing is lost twice."""
    parts = anatomy(model)
    found = []
    if kept.vision is not None:
        lost = ~kept.vision if len(kept.vision.shape) == 2 and parts.merged == 1 else ~kept.vision.any(0, keepdim=True)
        for number, layer in enumerate(parts.vision_layers):
            found.append((layer, lost if number >= settings.layer else None))
    first_image = 0 if settings.place in ("vision", "input", "joint") else settings.layer
    first_text = settings.layer or 0
    image = kept.image_BT
    for number, layer in enumerate(parts.language_layers):
        if number in parts.cross_layers:
            lost = None if kept.states is None or number < first_image else ~kept.states
        else:
            lost = ~kept.language & image if number >= first_image else torch.zeros_like(image)
            lost = lost | (~kept.language & ~image if number >= first_text else torch.zeros_like(image))
            lost = lost & kept.valid_BT  # padding is masked as it is
        found.append((layer, lost))
    return found


class Seen:
    """What was kept, with what a test knows of the tokens."""

    def __init__(self, kept, inputs):
        self.vision, self.language, self.states = kept.vision, kept.language, kept.states
        self.valid_BT = inputs["attention_mask"].bool()
        self.image_BT = (inputs["input_ids"] == IMAGE) & self.valid_BT


def longer(inputs, ids):
    """The inputs with further text behind."""
    new = ids.shape[1] - inputs["input_ids"].shape[1]
    result = {**inputs, "input_ids": ids}
    pad = torch.nn.functional.pad
    result["attention_mask"] = pad(inputs["attention_mask"], (0, new), value=1)
    if "mm_token_type_ids" in inputs:
        result["mm_token_type_ids"] = pad(inputs["mm_token_type_ids"], (0, new))
    if "token_type_ids" in inputs:  # an answer looks back alone
        result["token_type_ids"] = pad(inputs["token_type_ids"], (0, new), value=1)
    if "cross_attention_mask" in inputs:
        mask = inputs["cross_attention_mask"]
        result["cross_attention_mask"] = torch.cat([mask, mask[:, -1:].expand(-1, new, -1, -1)], dim=1)
    return result


def stretched(seen, new):
    """What was kept of the prompt, and all of what came after."""
    pad = torch.nn.functional.pad
    seen.language = pad(seen.language, (0, new), value=True)
    seen.valid_BT, seen.image_BT = pad(seen.valid_BT, (0, new), value=True), pad(seen.image_BT, (0, new), value=False)
    return seen


@pytest.mark.parametrize(("build", "batch", "name"), CASES, ids=[f"{b.__name__}-{n}-{p}" for b, n, p in CASES])
@torch.inference_mode()
def test_a_prompt_and_its_answer_are_those_of_the_masked_model(build, batch, name):
    model, inputs = make(build, batch)
    settings = PruningSettings(**PLACES[name])
    greedy = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    greedy["suppress_tokens"] = [0, IMAGE, 6]  # as text they would be images without an image
    plain = model(**inputs).logits
    with pruned(model, settings) as pruning:
        logits = model(**inputs).logits
        kept = pruning.kept()
        answer = model.generate(**inputs, **greedy)
        assert torch.equal(pruning.kept().language, kept.language)
    assert torch.equal(model(**inputs).logits, plain)  # nothing is left behind
    seen = Seen(kept, inputs)
    assert not torch.equal(kept.language, seen.valid_BT) or (kept.states is not None and not kept.states.all())
    with masked(twin(model, seen, settings)):
        expected = model(**inputs).logits
    assert (logits - expected)[kept.language].abs().max() < 1e-4
    assert (plain - expected)[kept.language].abs().max() > 1e-3

    ids = answer.sequences
    whole = longer(inputs, ids[:, :-1])
    with masked(twin(model, stretched(seen, NEW_TOKENS - 1), settings)):
        expected = model(**whole).logits[:, -NEW_TOKENS:]
    assert (torch.stack(answer.logits, dim=1) - expected).abs().max() < 1e-4
