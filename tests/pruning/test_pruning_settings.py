"""What pruning refuses, with what it expects instead."""

from types import SimpleNamespace

import pytest
import torch
from pydantic import ValidationError
from tiny_prunable import SHUFFLED, gemma3, llava, make, mllama

from bivlm.errors import InputError
from bivlm.pruning.dropping import pruned
from bivlm.recipe.pruning import PLACES, SCORES_AT, PruningSettings


@pytest.mark.parametrize("place", PLACES)
def test_every_place_can_be_scored_as_listed(place):
    layer = {} if place == "input" else {"layer": 1}
    for score in SCORES_AT[place]:
        assert place in PruningSettings(place=place, **layer, share=0.5, score=score).label


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"place": "language", "layer": 0, "share": 0.5}, "a layer from 1 on.*before the first layer is place 'input'"),
        ({"place": "vision", "share": 0.5}, "expected a layer from 1 on"),
        ({"place": "input", "layer": 1, "share": 0.5, "score": "random"}, "expected no layer"),
        ({"place": "language", "layer": 1, "share": 1.0}, "less than 1"),
        ({"place": "language", "layer": 1, "share": -0.1}, "greater than or equal to 0"),
        ({"place": "language", "layer": 1}, "either share or mass"),
        ({"place": "language", "layer": 1, "share": 0.5, "mass": 0.9}, "either share or mass"),
        ({"place": "text", "layer": 1, "mass": 0.9}, "only at place 'language'"),
        ({"place": "language", "layer": 1, "mass": 0.9, "score": "random"}, "mass is of attention"),
        ({"place": "language", "layer": 1, "share": 0.5, "score": "divprune"}, "expected one of attention, last_token"),
        ({"place": "input", "share": 0.5}, "expected one of divprune"),
        ({"place": "nowhere", "layer": 1, "share": 0.5}, "'vision', 'input', 'language', 'text' or 'joint'"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(settings, said):
    with pytest.raises(ValidationError, match=said):
        PruningSettings(**settings)


@pytest.mark.parametrize(
    ("build", "place", "layer", "said"),
    [
        (llava, "language", 4, "found 4, expected 1 to 3, the language model's last layer"),
        (llava, "vision", 4, "found 4, expected 1 to 3, the vision encoder's last layer"),
        (mllama, "language", 1, "found 1, expected 2 to 4.*cross-attention layers 1, 3, 4"),
        (mllama, "language", 5, "found 5, expected 2 to 4"),
    ],
)
def test_a_layer_out_of_range_is_refused_with_the_range(build, place, layer, said):
    model, _ = make(build)
    with pytest.raises(InputError, match=said), pruned(model, PruningSettings(place=place, layer=layer, share=0.5)):
        pass


@torch.inference_mode()
def test_a_prompt_without_tokens_to_tell_apart_is_refused():
    model, inputs = make(llava)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    with (
        pruned(model, PruningSettings(place="language", layer=1, share=0.5)),
        pytest.raises(InputError, match="found no input_ids"),
    ):
        model(inputs_embeds=embeds, attention_mask=inputs["attention_mask"])


@torch.inference_mode()
def test_a_share_that_leaves_no_token_is_refused():
    model, inputs = make(llava)
    with (
        pruned(model, PruningSettings(place="language", layer=1, share=0.99)),
        pytest.raises(InputError, match="leaves none of 16 image tokens"),
    ):
        model(**inputs)


def test_a_model_without_an_image_token_is_refused():
    model = SimpleNamespace(config=SimpleNamespace(model_type="llava"))
    with (
        pytest.raises(
            InputError, match="llava: no image token; pruning expects one of image_token_id, image_token_index"
        ),
        pruned(model, PruningSettings(place="language", layer=1, share=0.5)),
    ):
        pass


@torch.inference_mode()
def test_a_layer_behind_the_features_that_are_used_is_refused():
    """This model's language model gets what the last layer but one gives: dropping in the last would change nothing."""
    model, inputs = make(llava)
    with (
        pruned(model, PruningSettings(place="vision", layer=3, share=0.5)),
        pytest.raises(InputError, match="found 3, expected a lower one"),
    ):
        model(**inputs)


@torch.inference_mode()
def test_an_adaptor_that_mixes_all_tokens_is_refused():
    model, inputs = make(llava)
    projector = model.model.multi_modal_projector
    plain = projector.forward
    projector.forward = lambda features: plain(features) + plain(features).mean(1, keepdim=True)
    with (
        pruned(model, PruningSettings(place="vision", layer=1, share=0.5)),
        pytest.raises(InputError, match="all tokens are mixed"),
    ):
        model(**inputs)


@torch.inference_mode()
def test_a_prompt_without_an_image_after_one_with_is_read_whole():
    model, inputs = make(llava)
    text = {"input_ids": torch.tensor([[10, 11, 12]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    expected = model(**text).logits
    with pruned(model, PruningSettings(place="vision", layer=1, share=0.5)) as pruning:
        model(**inputs)
        assert pruning.kept().vision is not None
        assert torch.equal(model(**text).logits, expected)
        assert pruning.kept().vision is None


@torch.inference_mode()
def test_what_is_not_a_number_without_being_dropped_stays_so():
    model, inputs = make(llava)
    inputs["pixel_values"][0, 0, 0, 0] = torch.nan
    with pruned(model, PruningSettings(place="input", share=0.5, score="uniform")):
        assert model(**inputs).logits[:, -1].isnan().all()


@pytest.mark.parametrize("build", SHUFFLED, ids=lambda build: build.__name__)
@pytest.mark.parametrize("place", ["vision", "joint"])
def test_the_encoder_of_a_model_that_shuffles_pixels_keeps_its_tokens(build, place):
    model, _ = make(build)
    settings = PruningSettings(place=place, layer=2, share=0.5)
    with pytest.raises(InputError, match="shuffles neighbouring pixels"), pruned(model, settings):
        pass


@pytest.mark.parametrize("place", ["input", "language", "text", "vision"])
def test_a_language_model_with_sliding_windows_is_refused(place):
    model, _ = make(gemma3)
    settings = PruningSettings(place=place, share=0.5, **({"score": "divprune"} if place == "input" else {"layer": 2}))
    refusal = "gemma3: its language model has layers of sliding_attention"
    with pytest.raises(InputError, match=refusal), pruned(model, settings):
        pass
