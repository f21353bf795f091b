"""Flow runs that end in a state named after what ended them, for those who read states and not messages.

Names of states are also the names of Prefect's events: `infra/automations.py` lists them among the ends of a run.
"""

from __future__ import annotations

from prefect.client.schemas.objects import State
from prefect.states import Failed

from bivlm.errors import GateNotPassed, InputError, describe

COMPLETED = "Completed"  # Prefect's own
GATE_STATE = GateNotPassed.__name__
INPUT_STATE = InputError.__name__


def failed_by(error: GateNotPassed | InputError) -> State:
    """Return the failed state for a flow to return. Whoever calls the flow gets `error` raised, as it is."""
    return Failed(name=type(error).__name__, message=describe(error), data=error)
