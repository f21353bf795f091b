"""The champion's alias, the history of its moves and a gate's decisions, in a registry of MLflow's own."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from bivlm.errors import InputError
from bivlm.evaluation.gate import Decision
from bivlm.evaluation.paired import LargestLoss
from tasks.tracking.champions import moves_of
from tasks.tracking.models import _let_the_newest_be_candidate
from tasks.tracking.promotion import apply_decision, promote_by_gate, promote_by_hand, roll_back
from tasks.tracking.run import Tracking

NAME, MORE, FEWER = "llava-small", 1000, 100
CALLS = (
    "set_registered_model_tag",
    "set_registered_model_alias",
    "set_model_version_tag",
    "delete_registered_model_tag",
)


@pytest.fixture(scope="module")
def empty_registry(tmp_path_factory):
    """A registry with four whole versions and no champion; a copy of the file takes no time."""
    file = tmp_path_factory.mktemp("registry") / "mlflow.db"
    client = MlflowClient(f"sqlite:///{file}")
    run = client.create_run(client.create_experiment("bivlm", artifact_location=file.parent.as_uri()))
    client.set_terminated(run.info.run_id)
    client.create_registered_model(NAME)
    for number in range(1, 5):
        tags = {"bivlm.model_id": f"m-{number}", "bivlm.recorded": "2026-11-24T00:00:00+00:00"}
        client.create_model_version(NAME, file.parent.as_uri(), run.info.run_id, tags=tags)
    return file


@pytest.fixture
def client(empty_registry, tmp_path, monkeypatch):
    monkeypatch.setenv("BIVLM_CACHE", str(tmp_path / "cache"))
    return MlflowClient(f"sqlite:///{shutil.copyfile(empty_registry, tmp_path / 'mlflow.db')}")


def champion(client):
    version = client.get_registered_model(NAME).aliases.get("champion")
    return None if version is None else int(version)


def history(client):
    """The moves as ``from > to``; one that is not finished has a question mark."""
    moves = moves_of(client.get_registered_model(NAME).tags).values()
    return [f"{move.before or '-'} > {move.after}{'' if move.done else ' ?'}" for move in moves]


def test_a_move_is_written_on_the_model_and_on_both_versions(client):
    promote_by_gate(client, NAME, 1, "0.5 points lost at most")
    outcome = promote_by_hand(client, NAME, 2, "ann", "smaller")
    assert (outcome.champion, outcome.previous, outcome.moved, champion(client)) == (2, 1, True, 2)
    key, move = list(moves_of(client.get_registered_model(NAME).tags).items())[-1]
    assert (move.kind, move.before, move.after, move.who, move.why) == ("promotion", 1, 2, "ann", "smaller")
    assert move.when.endswith("+00:00")
    for number in (1, 2):
        assert json.loads(client.get_model_version(NAME, str(number)).tags[key]) == move.model_dump()


def test_what_is_so_already_is_not_done_again(client):
    promote_by_hand(client, NAME, 2, "ann", "smaller")
    outcome = promote_by_hand(client, NAME, 2, "bob", "again")
    assert (outcome.moved, outcome.said) == (False, "version 2 is champion already; nothing was done")
    assert not promote_by_gate(client, NAME, 2, "passed").moved
    assert not roll_back(client, NAME, "bob", "again", to=2).moved
    assert history(client) == ["- > 2"]


def test_a_rollback_goes_back_one_champion_at_a_time(client):
    for number in (1, 2, 4):
        promote_by_gate(client, NAME, number, "passed")
    assert roll_back(client, NAME, "ann", "slow").champion == 2
    assert roll_back(client, NAME, "ann", "slower").champion == 1
    with pytest.raises(InputError, match="llava-small: version 1 is champion, and none was before that one is"):
        roll_back(client, NAME, "ann", "slowest")
    assert roll_back(client, NAME, "ann", "not so slow", to=4).champion == 4
    assert history(client) == ["- > 1", "1 > 2", "2 > 4", "4 > 2", "2 > 1", "1 > 4"]


def test_what_cannot_be_promoted_is_refused_by_name(client):
    def refused(version, message, name=NAME, **options):
        with pytest.raises(InputError, match=message):
            promote_by_hand(client, name, version, "ann", "why not", **options)

    refused(1, r"nothing: no such model in the registry at sqlite:", name="nothing")
    refused(9, r"llava-small/9: the registry at sqlite:.* has no such version")
    client.set_model_version_tag(NAME, "1", "bivlm.gate", "refused")
    client.set_model_version_tag(NAME, "1", "bivlm.gate.reasons", "3 points lost")
    refused(1, r"llava-small/1: its gate has refused: 3 points lost; .* --although-refused")
    client.set_model_version_tag(NAME, "2", "bivlm.gate", "not decided")
    refused(2, r"llava-small/2: its gate has not decided: the run that made it was cut off before; run it again")
    client.delete_model_version_tag(NAME, "3", "bivlm.recorded")
    run = client.get_model_version(NAME, "3").run_id
    client.update_run(run, status="RUNNING")
    refused(3, "llava-small/3: the run that makes it is RUNNING, expected FINISHED", although_refused=True)
    client.delete_model_version_tag(NAME, "4", "bivlm.model_id")
    refused(4, "llava-small/4: not a version that `bivlm compress` has registered")
    assert champion(client) is None and history(client) == []
    assert promote_by_hand(client, NAME, 1, "ann", "a demonstration", although_refused=True).champion == 1
    client.update_run(run, status="FINISHED")
    assert promote_by_hand(client, NAME, 3, "ann", "of before there was the tag").champion == 3


def test_what_cannot_be_rolled_back_to_is_refused_by_name(client):
    with pytest.raises(InputError, match="llava-small: no version is champion, and none was before"):
        roll_back(client, NAME, "ann", "slow")
    promote_by_gate(client, NAME, 2, "passed")
    with pytest.raises(InputError, match=r"llava-small/3: was never champion; expected one of 2\. .* bivlm promote"):
        roll_back(client, NAME, "ann", "slow", to=3)
    with pytest.raises(InputError, match=r"llava-small/9: the registry .* has no such version"):
        roll_back(client, NAME, "ann", "slow", to=9)
    with pytest.raises(InputError, match="nothing: no such model"):
        roll_back(client, "nothing", "ann", "slow")
    promote_by_gate(client, NAME, 3, "passed")
    client.delete_model_version(NAME, "2")
    with pytest.raises(InputError, match=r"llava-small/2: the registry .* has no such version"):
        roll_back(client, NAME, "ann", "slow")
    assert champion(client) == 3


class CutOff(Exception):
    """The process is gone."""


class Mortal(MlflowClient):
    """Dies when it is to write for the n-th time."""

    lives = 0

    def _write(self, name, *arguments):
        if self.lives == 0:
            raise CutOff
        self.lives -= 1
        return getattr(MlflowClient, name)(self, *arguments)


for _name in CALLS:
    setattr(Mortal, _name, lambda self, *arguments, _name=_name: self._write(_name, *arguments))


@pytest.mark.parametrize("lives", range(6))
@pytest.mark.parametrize(
    ("act", "after"),
    [
        (lambda client: promote_by_gate(client, NAME, 3, "passed"), 3),
        (lambda client: promote_by_hand(client, NAME, 3, "ann", "smaller"), 3),
        (lambda client: roll_back(client, NAME, "ann", "slow"), 1),
        (lambda client: roll_back(client, NAME, "ann", "slow", to=1), 1),
    ],
    ids=["gate", "promotion", "rollback", "rollback to"],
)
def test_a_move_that_was_cut_off_anywhere_is_finished_by_the_same_request(client, act, after, lives):
    promote_by_gate(client, NAME, 1, "passed")
    promote_by_gate(client, NAME, 2, "passed")
    mortal = Mortal(client.tracking_uri)
    mortal.lives = lives
    cut_off = lives < 5  # the model's tag, the alias, two versions' tags, the model's tag
    if cut_off:
        with pytest.raises(CutOff):
            act(mortal)
    else:
        act(mortal)
    assert champion(client) in (2, after)
    if cut_off:
        assert act(client).champion == after
    assert champion(client) == after
    assert history(client) == ["- > 1", "1 > 2", f"2 > {after}"]
    last = list(moves_of(client.get_registered_model(NAME).tags))[-1]
    assert all(last in client.get_model_version(NAME, str(number)).tags for number in (2, after))


@pytest.mark.parametrize("lives", range(5))
def test_a_move_that_was_cut_off_anywhere_leaves_no_trace_or_all_of_it_to_another_request(client, lives):
    promote_by_gate(client, NAME, 1, "passed")
    mortal = Mortal(client.tracking_uri)
    mortal.lives = lives
    with pytest.raises(CutOff):
        promote_by_hand(mortal, NAME, 4, "ann", "smaller")
    moved = champion(client) == 4
    promote_by_hand(client, NAME, 2, "bob", "faster")
    assert history(client) == (["- > 1", "1 > 4", "4 > 2"] if moved else ["- > 1", "1 > 2"])


def test_of_two_gates_at_once_on_machines_without_a_common_lock_the_newer_version_stands(client, tmp_path, monkeypatch):
    """The older one's alias is set last: it sees the newer one's tag and gives way."""
    promote_by_gate(client, NAME, 1, "passed")

    class Late(MlflowClient):
        def set_registered_model_alias(self, name, alias, version):
            if version == "2":
                monkeypatch.setenv("BIVLM_CACHE", str(tmp_path / "another machine"))
                promote_by_gate(client, NAME, 3, "passed")
            super().set_registered_model_alias(name, alias, version)

    outcome = promote_by_gate(Late(client.tracking_uri), NAME, 2, "passed")
    assert (outcome.champion, outcome.moved) == (3, False)
    assert champion(client) == 3
    # The newer one found the older one's tag, and made its move.
    assert history(client) == ["- > 1", "1 > 2", "2 > 3"]


def test_of_two_gates_at_once_the_older_one_does_not_undo_what_the_newer_one_has_begun(client, tmp_path, monkeypatch):
    """All of the older one's move falls between the newer one's tag and its alias."""
    promote_by_gate(client, NAME, 1, "passed")
    said = []

    class Slow(MlflowClient):
        def set_registered_model_alias(self, name, alias, version):
            monkeypatch.setenv("BIVLM_CACHE", str(tmp_path / "another machine"))
            said.append(promote_by_gate(client, NAME, 2, "passed"))
            super().set_registered_model_alias(name, alias, version)

    outcome = promote_by_gate(Slow(client.tracking_uri), NAME, 3, "passed")
    assert (outcome.champion, outcome.moved) == (3, True)
    assert (said[0].champion, said[0].moved) == (3, False)
    assert champion(client) == 3
    assert history(client) == ["- > 1", "1 > 3"]


def test_a_gate_that_gives_way_leaves_no_move_on_any_version(client, tmp_path, monkeypatch):
    """Its tag and its alias come after the newer one has looked for others."""
    promote_by_gate(client, NAME, 1, "passed")

    class Late(MlflowClient):
        def set_registered_model_tag(self, name, key, value):
            if not said:
                said.append(True)
                monkeypatch.setenv("BIVLM_CACHE", str(tmp_path / "another machine"))
                promote_by_gate(client, NAME, 3, "passed")
            super().set_registered_model_tag(name, key, value)

    said = []
    assert promote_by_gate(Late(client.tracking_uri), NAME, 2, "passed").champion == 3
    assert champion(client) == 3
    assert history(client) == ["- > 1", "1 > 3"]
    kept = set(moves_of(client.get_registered_model(NAME).tags))
    for number in range(1, 4):
        assert set(moves_of(client.get_model_version(NAME, str(number)).tags)) <= kept


def test_gates_and_people_at_once_lose_no_move(client):
    def act(number):
        own = MlflowClient(client.tracking_uri)
        if number % 2:
            return promote_by_gate(own, NAME, number % 4 + 1, "passed")
        return promote_by_hand(own, NAME, number % 4 + 1, "ann", f"turn {number}")

    with ThreadPoolExecutor(8) as threads:
        outcomes = list(threads.map(act, range(16)))
    moves = list(moves_of(client.get_registered_model(NAME).tags).values())
    assert len(moves) == sum(outcome.moved for outcome in outcomes)
    assert all(move.done for move in moves)
    assert [move.before for move in moves] == [None, *(move.after for move in moves[:-1])]
    assert champion(client) == moves[-1].after


def test_other_trouble_is_not_taken_for_a_version_that_is_not_there(client, monkeypatch):
    def busy(*_):
        raise MlflowException("try later", 14)  # TEMPORARILY_UNAVAILABLE

    monkeypatch.setattr(MlflowClient, "get_model_version", busy)
    with pytest.raises(MlflowException, match="try later"):
        promote_by_hand(client, NAME, 1, "ann", "smaller")


def test_the_newest_version_is_candidate_whoever_sets_the_alias_last(client):
    class Late(MlflowClient):
        def set_registered_model_alias(self, name, alias, version):
            if version == "2":
                _let_the_newest_be_candidate(client, NAME, 4)  # on another machine
            super().set_registered_model_alias(name, alias, version)

    def candidate():
        return client.get_registered_model(NAME).aliases["candidate"]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tasks.tracking.models.alone", lambda *_: nullcontext())
        _let_the_newest_be_candidate(Late(client.tracking_uri), NAME, 2)
    assert int(candidate()) == 4
    _let_the_newest_be_candidate(client, NAME, 3)
    assert int(candidate()) == 4


@pytest.fixture
def decide(client):
    """Decide about version 1: passed or not, after so many questions."""
    run = client.get_run(client.get_model_version(NAME, "1").run_id).info
    model = client.create_logged_model(run.experiment_id, name="x", source_run_id=run.run_id).model_id
    place = Tracking(client.tracking_uri, run.experiment_id, run.run_id, "r", "l", "t")
    client.set_model_version_tag(NAME, "1", "bivlm.gate", "not decided")

    def decide(passed, questions):
        reasons = (f"{'passed' if passed else 'refused'} after {questions}",)
        decision = Decision(passed, reasons, () if passed else reasons)
        losses = {"b": LargestLoss(questions, 0.0, 3.0, 0.95, 0, 0)}
        return apply_decision.fn(place, NAME, 1, decision, losses, model)

    decide.standing = lambda: (client.get_model_version(NAME, "1").tags["bivlm.gate"], champion(client))
    return decide


def test_a_refusal_is_not_undone_by_fewer_questions(decide):
    assert decide(False, MORE).said == "no version is champion"
    found = decide(True, FEWER)
    assert found.champion is None
    assert found.said == "no version is champion: it was refused after 1000 questions, and these are 100"
    assert decide.standing() == ("refused", None)
    assert decide(True, MORE).champion == 1
    assert decide.standing() == ("passed", 1)


def test_what_has_passed_is_not_undone_by_fewer_questions(decide):
    decide(True, MORE)
    assert decide(False, FEWER).said == "version 1 stays champion"
    assert decide.standing() == ("passed", 1)
    assert decide(True, FEWER).champion == 1


def test_a_version_is_decided_about_when_its_champion_has_moved_and_not_before(decide, monkeypatch):
    def gone(*_):
        raise CutOff

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "set_registered_model_alias", gone)
        with pytest.raises(CutOff):
            decide(True, MORE)
    assert decide.standing() == ("not decided", None)
    decide(True, MORE)
    assert decide.standing() == ("passed", 1)
