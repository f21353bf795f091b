"""The champion of a registered model: its alias in MLflow moved by a gate or by hand, and the history of its moves.

A move is a tag of the registered model and of both versions. MLflow has no transactions: the tag is written first, then
the alias moves, then the tag says so. The next move finishes or drops one that was cut off, so that the history has
every move that took place and no other. A move that was cut off looks like one that another machine is making; what is
done about it is right for both.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from prefect import task

from bivlm.errors import InputError
from bivlm.evaluation.gate import Decision
from bivlm.evaluation.paired import LargestLoss
from bivlm.workspace.hashing import digest
from bivlm.workspace.locks import one_at_a_time
from bivlm.workspace.stores.location import cache_folder
from tasks.runtime.naming import slug
from tasks.runtime.policy import OVER_NETWORK
from tasks.tracking import champions
from tasks.tracking.champions import Kind, Move, moves_of
from tasks.tracking.pages import write_pages
from tasks.tracking.record import log_new_metrics
from tasks.tracking.registry import CHAMPION, is_absent, tag_version, told_if_absent, version_at
from tasks.tracking.run import Tracking, public_uri
from tasks.tracking.tags import LONGEST, PASSED, REFUSED, Tag, tags_of


@dataclass(frozen=True)
class Outcome:
    """The champion now and before, whether the alias moved, and a sentence that says all of it."""

    champion: int | None
    previous: int | None
    moved: bool
    said: str


@task(name="gate", **OVER_NETWORK)
def apply_decision(
    tracking: Tracking,
    name: str,
    version: int,
    decision: Decision,
    losses: Mapping[str, LargestLoss],
    model_id: str,
) -> Outcome:
    """Write a gate's decision on the run and the version; make the version champion if it passed, forwards only.

    A decision after fewer questions than the recorded one does not replace it, and moves no champion that the recorded
    one would not have moved.
    """
    client, questions = tracking.client, sum(found.n for found in losses.values())
    registered = client.get_model_version(name, str(version))
    before = tags_of(registered)
    stands = questions >= before.gate_questions
    tags = {
        Tag.GATE: PASSED if decision.passed else REFUSED,
        Tag.GATE_REASONS: "; ".join(decision.reasons)[:LONGEST],
        Tag.GATE_QUESTIONS: str(questions),
    }
    if stands:
        metrics = {f"gate/{slug(benchmark)}/lost": found.loss for benchmark, found in losses.items()}
        metrics |= {f"gate/{slug(benchmark)}/lost_at_most": found.largest for benchmark, found in losses.items()}
        log_new_metrics(client, tracking.run_id, metrics, model_id)
        for key, value in tags.items():
            client.set_tag(tracking.run_id, key, value)
    if decision.passed and (stands or before.gate == PASSED):
        outcome = promote_by_gate(client, name, version, "; ".join(decision.reasons))
    else:
        champion = version_at(client.get_registered_model(name), CHAMPION)
        said = "no version is champion" if champion is None else f"version {champion} stays champion"
        if decision.passed:
            said += f": it was refused after {before.gate_questions} questions, and these are {questions}"
        outcome = Outcome(champion, champion, False, said)
    if stands:  # last: until then the version counts as undecided, and the same request decides again
        tag_version(client, registered, tags)
    return outcome


@task(name="write-pages", **OVER_NETWORK)
def refresh_pages(tracking: Tracking, name: str) -> None:
    """Update the pages of a registered model, its versions and its base model."""
    write_pages(tracking.client, name)


def promote_by_gate(client: MlflowClient, name: str, version: int, why: str) -> Outcome:
    """Make a version that passed its gate champion, unless that is a step back (`champions.stays`)."""
    with _settled(client, name) as history:
        champion = history.champion
        if any(move.kind == "gate" and move.after == version for move in history.finished):
            return _moved(history.finished[-1])
        if reason := champions.stays(version, champion, history.moves.values()):
            return Outcome(champion, champion, False, reason)
        key, move = history.begin("gate", version, "gate", why)
        # Of two gates at once, on machines that do not see each other's locks, the newer version wins.
        seen = moves_of(client.get_registered_model(name).tags)
        newer = [each.after for other, each in seen.items() if other not in history.moves and each.after > version]
        if newer:
            client.set_registered_model_alias(name, CHAMPION, str(max(newer)))
            if key in seen and not seen[key].done:  # else the other has seen it take place
                client.delete_registered_model_tag(name, key)
            return Outcome(max(newer), champion, False, f"version {max(newer)}, which is newer, has become champion")
        return _moved(history.finish(key, move))


def promote_by_hand(
    client: MlflowClient, name: str, version: int, who: str, why: str, *, although_refused: bool = False
) -> Outcome:
    """Make a version champion whatever was champion before.

    Raises `InputError` if there is no such version, if it was not recorded to its end, or if its gate did not let it
    pass, unless `although_refused`.
    """
    with _settled(client, name) as history:
        _check_promotable(client, _version_of(client, name, version), although_refused)
        if history.champion == version:
            return _moved(history.finished[-1]) if history.finished else _nothing(version)
        return _moved(history.finish(*history.begin("promotion", version, who, why)))


def roll_back(client: MlflowClient, name: str, who: str, why: str, to: int | None = None) -> Outcome:
    """Make a version champion again: `to`, else the champion before this one.

    A second rollback goes back one further. Raises `InputError` if there is no such version, or it never was champion.
    """
    with _settled(client, name) as history:
        champion, finished = history.champion, history.finished
        if finished and finished[-1].kind == "rollback" and to in (None, champion):
            return _moved(finished[-1])  # the same rollback, which was cut off
        if to is not None and to == champion:
            return _nothing(to)
        were = {move.after for move in history.moves.values() if move.done}
        target = champions.champion_before(champion, history.moves.values()) if to is None else to
        if target is None:
            present = "no version" if champion is None else f"version {champion}"
            raise InputError(f"{name}: {present} is champion, and none was before that one is; nothing to go back to")
        _version_of(client, name, target)
        if target not in were:
            known = f"expected one of {', '.join(map(str, sorted(were)))}" if were else "no version was"
            raise InputError(f"{name}/{target}: was never champion; {known}. To make it champion: bivlm promote")
        return _moved(history.finish(*history.begin("rollback", target, who, why)))


@dataclass
class _History:
    """A model's champion and moves; `finished` are moves that were cut off before, and are finished now."""

    client: MlflowClient
    name: str
    champion: int | None
    moves: dict[str, Move]
    finished: list[Move] = field(default_factory=list)

    def settle(self) -> None:
        """Finish or drop the moves that were cut off.

        One whose alias has moved took place. A gate's is made now if it still may be: its version has passed. One by
        hand is dropped: the user who made it will repeat it.
        """
        for key, move in list(self.moves.items()):
            if move.done:
                continue
            forwards = champions.stays(move.after, self.champion, self.moves.values()) is None
            if self.champion != move.after and move.kind == "gate" and forwards:
                self.client.set_registered_model_alias(self.name, CHAMPION, str(move.after))
                self.champion = move.after
            if self.champion == move.after:
                self.moves[key] = self.finish(key, move)
                self.finished.append(self.moves[key])
            else:
                self.client.delete_registered_model_tag(self.name, key)
                del self.moves[key]

    def begin(self, kind: Kind, after: int, who: str, why: str) -> tuple[str, Move]:
        """Write a move down and move the alias; return the move's key and the move, which `finish` completes."""
        key, why = champions.next_key(self.moves, secrets.token_hex(4)), why[: champions.LONGEST]
        when = champions.now()
        move = Move(kind=kind, before=self.champion, after=after, who=who, why=why, when=when, done=False)
        self.client.set_registered_model_tag(self.name, key, move.model_dump_json())
        self.client.set_registered_model_alias(self.name, CHAMPION, str(after))
        return key, move

    def finish(self, key: str, move: Move) -> Move:
        """Write on both versions, and last on the model, that the alias has moved."""
        done = move.model_copy(update={"done": True})
        text = done.model_dump_json()
        for version in (move.before, move.after):
            if version is not None:
                try:
                    self.client.set_model_version_tag(self.name, str(version), key, text)
                except MlflowException as error:
                    if not is_absent(error):  # somebody has deleted the version; the model's tag keeps the move
                        raise
        self.client.set_registered_model_tag(self.name, key, text)
        return done


@contextmanager
def alone(client: MlflowClient, name: str) -> Iterator[None]:
    """Let one process at a time on this machine move the aliases of a model."""
    which = digest([public_uri(client.tracking_uri), name])[:32]
    with one_at_a_time(cache_folder() / "locks" / f"champion-{which}.lock"):
        yield


@contextmanager
def _settled(client: MlflowClient, name: str) -> Iterator[_History]:
    with alone(client, name):
        with told_if_absent(f"{name}: no such model in the registry at {public_uri(client.tracking_uri)}"):
            model = client.get_registered_model(name)
        history = _History(client, name, version_at(model, CHAMPION), moves_of(model.tags))
        history.settle()
        yield history


def _moved(move: Move) -> Outcome:
    before = "no version" if move.before is None else f"version {move.before}"
    why = "" if move.kind == "gate" else f"; by {move.who}: {move.why}"  # a gate's reasons are printed already
    return Outcome(move.after, move.before, True, f"version {move.after} is champion, {before} was{why}")


def _nothing(version: int) -> Outcome:
    return Outcome(version, version, False, f"version {version} is champion already; nothing was done")


def _version_of(client: MlflowClient, name: str, version: int) -> ModelVersion:
    place = public_uri(client.tracking_uri)
    with told_if_absent(f"{name}/{version}: the registry at {place} has no such version"):
        return client.get_model_version(name, str(version))


def _check_promotable(client: MlflowClient, found: ModelVersion, although_refused: bool) -> None:
    named, tags = f"{found.name}/{found.version}", tags_of(found)
    if tags.model_id is None:
        raise InputError(f"{named}: not a version that `bivlm compress` has registered")
    # Versions older than the tag are complete if their run has finished.
    if tags.recorded is None and (run := client.get_run(found.run_id)).info.status != "FINISHED":
        raise InputError(f"{named}: the run that makes it is {run.info.status}, expected FINISHED; run it again")
    if not tags.passed and not although_refused:
        reasons = tags.gate_reasons or "the run that made it was cut off before; run it again"
        raise InputError(
            f"{named}: its gate has {tags.gate}: {reasons}; to make it champion all the same say --although-refused"
        )
