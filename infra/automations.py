"""Prefect's automations that are not a deployment's own: `python -m infra.automations` makes or renews them.

A run whose worker was killed, or whose machine is gone, cannot say so: without this it would be `Running` for ever.
Runs send a heartbeat every ``PREFECT_FLOWS_HEARTBEAT_FREQUENCY`` seconds; one that has been silent for `SILENCE` is
marked as crashed, which informs those who wait for it. Run again, it resumes from its finished steps.

A run that has not begun sends none. If its worker died before that, or its pod finds no node or no image, it would be
`Pending` for ever: after `WAITING` it is marked as crashed, too.
"""

from __future__ import annotations

from datetime import timedelta

from prefect.automations import Automation
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import EventTrigger, Posture
from prefect.server.schemas.states import StateType

SILENCE = timedelta(seconds=120)  # four heartbeats of 30 s
WAITING = timedelta(hours=1)  # for a node and an image; for a place in its pool a run waits as `Late`
_HEARTBEAT = "heartbeat"
# The names of a run's last states, those of tasks/runtime/states.py included.
ENDS = {"Completed", "Failed", "Cancelled", "Crashed", "Cancelling", "GateNotPassed", "InputError"}


def lost_runs() -> Automation:
    """Return the automation that marks a run as crashed if no heartbeat or end follows one within `SILENCE`."""
    return _crashed_without(
        expected={_HEARTBEAT, *ENDS},
        after={_HEARTBEAT},
        within=SILENCE,
        name="bivlm: a run that has fallen silent has crashed",
        description="Its worker was killed or its machine is gone. Run it again: finished steps are not done twice.",
        message=f"no heartbeat for {SILENCE.seconds} s: its worker or machine is lost; run it again, it "
        "resumes from its finished steps",
    )


def stuck_runs(waiting: timedelta = WAITING) -> Automation:
    """Return the automation that marks a run as crashed if it stays in one of the pending states for `waiting`."""
    return _crashed_without(
        expected={"*"},
        after={"Pending", "Submitting", "InfrastructurePending"},
        within=waiting,
        name="bivlm: a run that does not begin has crashed",
        description="Its worker died before it began, or its pod finds no node or no image: its log may say which.",
        message=f"it did not begin within {waiting.total_seconds():.0f} s: its worker died, or its pod found "
        "no node or no image; fix that and run it again",
    )


def _crashed_without(
    *, expected: set[str], after: set[str], within: timedelta, name: str, description: str, message: str
) -> Automation:
    """Mark a run as crashed that has sent one of the events `after` and none of those `expected` for so long."""
    trigger = EventTrigger(
        match={"prefect.resource.id": "prefect.flow-run.*"},
        for_each={"prefect.resource.id"},
        after={f"prefect.flow-run.{each}" for each in after},
        expect={f"prefect.flow-run.{each}" for each in expected},
        posture=Posture.Proactive,
        threshold=1,
        within=within,
    )
    crashed = ChangeFlowRunState(state=StateType.CRASHED, message=message)
    return Automation(name=name, description=description, trigger=trigger, actions=[crashed])


def renew(wanted: Automation) -> None:
    """Make the automation, or bring the one of that name up to date."""
    try:
        found = Automation.read(name=wanted.name)
    except ValueError:
        wanted.create()
        print(f"made: {wanted.name}")
        return
    found.trigger, found.actions, found.description = wanted.trigger, wanted.actions, wanted.description
    found.update()
    print(f"renewed: {wanted.name}")


if __name__ == "__main__":
    renew(lost_runs())
    renew(stuck_runs())
