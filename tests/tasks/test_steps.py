"""A step that several workers do at once is one step to all who use it."""

from __future__ import annotations

from bivlm.workspace.hashing import digest, step_identity
from bivlm.workspace.steps import Workspace
from tasks.runtime.steps import do_step

IDENTITY = step_identity("statistics", 1, {}, None, exact=True)


def test_of_two_workers_that_do_the_same_step_at_once_the_first_record_stands(tmp_path):
    """Their lineage records would otherwise tell of different times for one step, and one of them not be found."""
    place, first = Workspace.open(tmp_path), []

    def work(folder):
        (folder / "file").write_bytes(b"made")
        return {"error": 0.25}

    def work_while_another_does_it(folder):
        first.append(do_step(place, IDENTITY, work))
        return work(folder)

    second = do_step(place, IDENTITY, work_while_another_does_it)
    assert first[0].record == second.record == place.record(digest(IDENTITY))
    assert not first[0].reused and not second.reused


def test_a_worker_that_makes_something_else_says_so(tmp_path):
    """As where an answer flips between two runs: the record is of what its outputs are."""
    place = Workspace.open(tmp_path)
    made = do_step(place, IDENTITY, lambda folder: {"bytes": (folder / "file").write_bytes(b"one")})
    place.store.delete(f"objects/{made.record.outputs['file'].sha256[:2]}/{made.record.outputs['file'].sha256}")
    again = do_step(place, IDENTITY, lambda folder: {"bytes": (folder / "file").write_bytes(b"two")})
    assert again.record.outputs != made.record.outputs
    assert place.record(digest(IDENTITY)) == again.record


def test_records_of_one_step_may_differ_in_time_and_place_alone(tmp_path):
    made = do_step(Workspace.open(tmp_path), IDENTITY, lambda folder: {"error": 0.25}).record
    elsewhere = made.model_copy(update={"seconds": made.seconds + 1, "environment": {"python": "3.99"}})
    assert elsewhere != made and elsewhere.says_the_same_as(made)
    assert not made.model_copy(update={"figures": {"error": 0.5}}).says_the_same_as(made)
