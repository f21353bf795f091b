"""Scores against attention weights that the model itself gives, and the caches' sizes."""

import pytest
import torch
from tiny_prunable import FAMILIES, IMAGE, llava, make, mllama, qwen2_5_vl

from bivlm.pruning.dropping import pruned
from bivlm.recipe.pruning import PruningSettings


def received(weights_BHQK, queries_BQ):
    """Mean over heads and the queries that count."""
    mean_BQK = weights_BHQK.double().mean(1)
    return (mean_BQK * queries_BQ[:, :, None]).sum(1) / queries_BQ.sum(1, keepdim=True)


@pytest.mark.parametrize("score", ["attention", "last_token"])
@pytest.mark.parametrize("build", [llava, qwen2_5_vl], ids=lambda build: build.__name__)
@torch.inference_mode()
def test_tokens_that_receive_most_attention_stay(build, score):
    model, inputs = make(build, 4)
    image, valid = inputs["input_ids"] == IMAGE, inputs["attention_mask"].bool()
    model.set_attn_implementation("eager")
    weights = model(**inputs, output_attentions=True).attentions[1]
    model.set_attn_implementation("sdpa")
    queries = valid.double()
    if score == "last_token":
        queries[:, :-1] = 0
    expected = received(weights, queries)
    with pruned(model, PruningSettings(place="language", layer=2, share=0.5, score=score)) as pruning:
        model(**inputs)
    kept = pruning.kept().language
    for row in range(4):
        tokens = image[row].nonzero().view(-1)
        best = tokens[expected[row, tokens].argsort(descending=True)[: len(tokens) - len(tokens) // 2]]
        assert (kept[row] & image[row]).nonzero().view(-1).tolist() == best.sort().values.tolist()
    assert torch.equal(kept & ~image, valid & ~image)


@torch.inference_mode()
def test_in_the_vision_encoder_the_class_token_stays_and_is_no_candidate():
    model, inputs = make(llava, 2)
    model.set_attn_implementation("eager")
    weights = model.model.vision_tower(inputs["pixel_values"], output_attentions=True).attentions[1]
    model.set_attn_implementation("sdpa")
    expected = received(weights, torch.ones(2, 17, dtype=torch.float64))
    with pruned(model, PruningSettings(place="vision", layer=2, share=0.75)) as pruning:
        model(**inputs)
    kept = pruning.kept()
    assert kept.vision[:, 0].all()
    for row in range(2):
        best = expected[row, 1:].argsort(descending=True)[:4].sort().values
        assert kept.vision[row, 1:].nonzero().view(-1).tolist() == best.tolist()
        # Patch by patch these are the image tokens that the language model keeps.
        image = inputs["input_ids"][row] == IMAGE
        assert kept.language[row][image].nonzero().view(-1).tolist() == best.tolist()


@torch.inference_mode()
def test_merged_patches_stay_or_go_together_and_so_do_their_tokens():
    model, inputs = make(qwen2_5_vl, 2)
    with pruned(model, PruningSettings(place="vision", layer=2, share=0.5)) as pruning:
        model(**inputs)
    kept = pruning.kept()
    first = kept.vision[0, :64].view(16, 4)
    assert torch.equal(first.all(1), first.any(1))
    assert first.all(1).sum() == 8
    # Windows of 2 x 2 tokens of a 4 x 4 grid, one after another: where the kept ones stand in the image.
    grid = torch.arange(16).view(2, 2, 2, 2).transpose(1, 2).reshape(16)
    image = inputs["input_ids"][0] == IMAGE
    assert kept.language[0][image].nonzero().view(-1).tolist() == grid[first.all(1)].sort().values.tolist()


@pytest.mark.parametrize("build", FAMILIES, ids=lambda build: build.__name__)
@torch.inference_mode()
def test_caches_are_shorter_from_the_layer_on(build):
    model, inputs = make(build)
    plain = model(**inputs, use_cache=True).past_key_values
    with pruned(model, PruningSettings(place="language", layer=2, share=0.5)):
        cache = model(**inputs, use_cache=True).past_key_values
    sizes, before = ([layer.keys.shape[2] for layer in each.layers] for each in (cache, plain))
    if build is mllama:  # the features of two tiles of 4 x 4 patches and a class token each
        assert sizes == [before[0], 34, before[2], 17, 17, before[5]]
        return
    images = int((inputs["input_ids"] == IMAGE).sum())
    assert sizes[:2] == before[:2]
    assert sizes[2:] == [before[0] - images // 2] * 2
    assert cache.get_seq_length() == plain.get_seq_length()


@torch.inference_mode()
def test_random_choices_do_not_depend_on_the_batch():
    model, inputs = make(llava, 3)
    settings = PruningSettings(place="language", layer=1, share=0.5, score="random", seed=3)
    with pruned(model, settings) as pruning:
        model(**inputs)
        together = pruning.kept().language
        for row in range(3):
            model(**{name: tensor[row : row + 1] for name, tensor in inputs.items()})
            assert torch.equal(pruning.kept().language[0], together[row])
    with pruned(model, settings.model_copy(update={"seed": 4})) as pruning:
        model(**inputs)
        assert not torch.equal(pruning.kept().language, together)


@torch.inference_mode()
def test_the_mass_of_attention_keeps_another_number_for_every_prompt():
    model, inputs = make(llava, 4)
    image = inputs["input_ids"] == IMAGE
    counts = []
    for mass in (0.3, 0.6, 1.0):
        with pruned(model, PruningSettings(place="language", layer=2, mass=mass)) as pruning:
            model(**inputs)
        counts.append((pruning.kept().language & image).sum(1))
    assert (counts[0] < counts[1]).all()
    assert counts[2].tolist() == [16] * 4
    assert len(set(counts[1].tolist())) > 1
