"""Which tokens stay, against brute force and by properties."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bivlm.errors import InputError
from bivlm.pruning.selection import at_random, by_mass, cdpruner, divprune, evenly, highest, kept_count, relevance

SCORES = st.lists(st.floats(0, 1, width=32), min_size=1, max_size=30).map(torch.tensor)


@given(SCORES, st.data())
def test_the_highest_scores_stay(scores, data):
    count = data.draw(st.integers(0, len(scores)))
    kept = highest(scores, count)
    assert kept.sum() == count
    if 0 < count < len(scores):
        assert scores[kept].min() >= scores[~kept].max()


def test_of_equal_scores_the_first_stay():
    assert highest(torch.tensor([0.0, 1.0, 1.0, 1.0]), 2).tolist() == [False, True, True, False]


@given(SCORES, st.floats(0.01, 1))
def test_the_fewest_tokens_hold_the_mass(scores, mass):
    kept = by_mass(scores, mass)
    total = scores.double().sum()
    assert kept.any()
    assert scores.double()[kept].sum() >= mass * total * (1 - 1e-9)
    if kept.sum() > 1:
        fewer = scores.double()[kept].sort(descending=True).values[:-1]
        assert fewer.sum() < mass * total


@given(st.integers(1, 200), st.data())
def test_controls_keep_as_many_as_they_should(tokens, data):
    count = data.draw(st.integers(0, tokens))
    spread = evenly(tokens, count)
    assert spread.sum() == count
    assert at_random(tokens, count, 1).sum() == count
    if count > 1:
        gaps = spread.nonzero().view(-1).diff()
        assert gaps.max() - gaps.min() <= 1


def test_another_seed_gives_other_tokens():
    assert not torch.equal(at_random(100, 50, 1), at_random(100, 50, 2))
    assert torch.equal(at_random(100, 50, 1), at_random(100, 50, 1))


def cosine_distances(features):
    unit = features.double() / features.double().norm(dim=1, keepdim=True)
    return 1 - unit @ unit.T


@pytest.mark.parametrize("seed", range(5))
def test_diversity_is_the_greedy_farthest_first_choice(seed):
    features = torch.randn(12, 5, generator=torch.Generator().manual_seed(seed))
    distances = cosine_distances(features)
    nearest = [min(distances[i, j] for j in range(12) if j != i) for i in range(12)]
    taken = [max(range(12), key=lambda i: nearest[i])]
    while len(taken) < 5:
        rest = [i for i in range(12) if i not in taken]
        taken.append(max(rest, key=lambda i: min(distances[i, j] for j in taken)))
    assert divprune(features, 5).nonzero().view(-1).tolist() == sorted(taken)


def test_diversity_takes_one_of_each_direction():
    directions = torch.eye(4).repeat(5, 1) * torch.rand(20, 1).add(0.1)
    kept = divprune(directions, 4)
    assert directions[kept].argmax(1).sort().values.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("seed", range(5))
def test_the_process_adds_the_token_with_the_largest_determinant(seed):
    generator = torch.Generator().manual_seed(seed)
    features, about = torch.randn(9, 6, generator=generator), torch.rand(9, generator=generator)
    scaled = ((about - about.min() + 1e-6) / (about.max() - about.min() + 1e-6)).double()
    kernel = scaled[:, None] * (1 - cosine_distances(features)) * scaled
    taken = []
    for _ in range(4):
        rest = [i for i in range(9) if i not in taken]
        taken.append(max(rest, key=lambda i: float(torch.linalg.det(kernel[[*taken, i]][:, [*taken, i]]))))
    assert cdpruner(features, about, 4).nonzero().view(-1).tolist() == sorted(taken)


def test_relevance_is_the_angle_to_the_mean_of_the_text():
    text = torch.tensor([[2.0, 0.0], [0.0, 2.0]])
    assert relevance(torch.tensor([[3.0, 3.0], [1.0, -1.0]]), text).tolist() == pytest.approx([1.0, 0.0], abs=1e-6)


def test_a_share_is_rounded_to_whole_tokens_and_leaves_one():
    assert [kept_count(100, share) for share in (0.0, 0.25, 0.863, 0.99)] == [100, 75, 14, 1]
    with pytest.raises(InputError, match=r"pruning.share 0.99 leaves none of 16 image tokens; expected at most 0.9375"):
        kept_count(16, 0.99)


def test_every_choice_of_three_is_some_tokens_score():
    """Whatever three of five tokens score highest are kept: no place is favoured."""
    for wanted in itertools.combinations(range(5), 3):
        scores = torch.zeros(5)
        scores[list(wanted)] = torch.tensor([0.3, 0.2, 0.1])
        assert highest(scores, 3).nonzero().view(-1).tolist() == list(wanted)
