"""The history of a champion: what a rollback goes back to, and what a gate leaves alone."""

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bivlm.errors import InputError
from tasks.tracking.champions import LONGEST, Move, champion_before, line_of, moves_of, next_key, one_line, stays


def history(*moves):
    """Moves as ``"gate 3"``, one after the other; ``"gate 3?"`` was cut off."""
    found, champion = [], None
    for text in moves:
        kind, version = text.removesuffix("?").split()
        done = not text.endswith("?")
        found.append(
            Move(kind=kind, before=champion, after=int(version), who="me", why="so", when="2026-11-24", done=done)
        )
        champion = int(version) if done else champion
    return found


@pytest.mark.parametrize(
    ("moves", "champion", "before"),
    [
        ([], None, None),
        (["gate 1"], 1, None),
        (["gate 1", "gate 2", "promotion 5"], 5, 2),
        (["gate 1", "gate 2", "gate 3", "rollback 2"], 2, 1),
        (["gate 1", "gate 2", "gate 3", "rollback 2", "rollback 1"], 1, None),
        (["gate 1", "gate 2", "gate 3", "rollback 2", "gate 4"], 4, 2),
        (["gate 1", "gate 2", "gate 3", "rollback 1", "gate 4", "rollback 1"], 1, None),
        (["gate 1", "gate 2", "promotion 1"], 1, 2),
        (["gate 1", "gate 2?"], 1, None),
        (["gate 1", "gate 2"], 7, 2),  # by somebody who moved the alias in MLflow's pages
    ],
)
def test_a_rollback_goes_to_the_champion_before_and_never_to_one_that_was_taken_back(moves, champion, before):
    assert champion_before(champion, history(*moves)) == before


@pytest.mark.parametrize(
    ("version", "champion", "moves", "said"),
    [
        (1, None, [], None),
        (3, 2, ["gate 1", "gate 2"], None),
        (2, 2, ["gate 1", "gate 2"], "version 2 is champion already"),
        (1, 2, ["gate 1", "gate 2"], "version 1 was champion before, and version 2 is now"),
        (2, 1, ["gate 1", "gate 2", "rollback 1"], "version 2 was champion before, and version 1 is now"),
        (3, 4, ["gate 1", "gate 4"], "version 4, which is newer, is champion"),
        (3, 1, ["gate 1", "gate 4", "rollback 1"], "version 4, which is newer, was champion"),
        (2, 5, [], "version 5, which is newer, is champion"),
        (2, None, ["gate 2"], "version 2 was champion before, and none is now"),
        (2, 1, ["gate 1", "gate 2?"], None),
    ],
)
def test_a_gate_moves_the_champion_forwards_only(version, champion, moves, said):
    found = stays(version, champion, history(*moves))
    assert (found is None) == (said is None)
    assert said is None or found.startswith(said)


@given(st.lists(st.tuples(st.sampled_from(["gate", "promotion", "rollback"]), st.integers(1, 6)), max_size=12))
def test_rollbacks_come_to_an_end_and_pass_no_version_twice_running(moves):
    steps = history(*(f"{kind} {version}" for kind, version in moves))
    line = line_of(steps)
    assert all(one != other for one, other in pairwise(line))
    champion, seen = (steps[-1].after if steps else None), []
    while (before := champion_before(champion, steps)) is not None:
        assert before != champion
        steps += history(f"rollback {before}")
        champion = before
        seen.append(before)
    assert len(seen) < len(moves) or not moves


def test_moves_are_read_back_in_their_order_whatever_else_the_model_is_tagged_with():
    (first,), (second,) = history("gate 1"), history("promotion 2")
    keys = [next_key([], "zz")]
    keys.append(next_key(keys, "aa"))
    tags = {keys[1]: second.model_dump_json(), "owner": "vision", keys[0]: first.model_dump_json()}
    assert list(moves_of(tags).values()) == [first, second]
    assert {"from", "to", "who", "why", "when"} <= set(json.loads(tags[keys[0]]))


@pytest.mark.parametrize(
    ("text", "said"),
    [('{"kind": "gate", "from": 1}', "to: Field required")]
    + [(text, "") for text in ("", "[" * 5000, "9" * 5000, '{"to": 1, "to": 2}', "NaN", "[]", '"x"')],
)
def test_a_move_that_is_none_is_named(text, said):
    with pytest.raises(InputError, match=rf"tag bivlm\.move\.000001-a: not a move of a champion: {said}"):
        moves_of({"bivlm.move.000001-a": text})


@pytest.mark.parametrize("text", ["", "  ", "two\nlines", "x" * (LONGEST + 1), "\x1b[31mred"])
def test_a_reason_that_nobody_can_read_is_refused(text):
    with pytest.raises(InputError, match=r"--why .*expected one line"):
        one_line("--why", text)
    assert one_line("--why", " smaller ") == "smaller"
