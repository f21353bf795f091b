"""What MLflow is told of a compression: one parent run, a child run per evaluation, the model and its version.

Every function finds what an earlier attempt has already written and adds only what is missing, so that each may be
tried again, and a request that was fulfilled before leaves no second trace.
"""

from tasks.tracking.decision import apply_decision, refresh_pages
from tasks.tracking.documents import log_documents, other_points
from tasks.tracking.facts import facts_of, questions_asked, scores_of
from tasks.tracking.models import log_base_model, log_model, register
from tasks.tracking.record import log_comparison, log_compression, log_evaluation
from tasks.tracking.run import (
    Tracking,
    ends_run,
    find_or_create_run,
    note,
    public_uri,
    request_digest,
    run_page,
    ui_command,
)
from tasks.tracking.sweeps import log_sweep

STAGE = "registration"

__all__ = [
    "STAGE",
    "Tracking",
    "apply_decision",
    "ends_run",
    "facts_of",
    "find_or_create_run",
    "log_base_model",
    "log_comparison",
    "log_compression",
    "log_documents",
    "log_evaluation",
    "log_model",
    "log_sweep",
    "note",
    "other_points",
    "public_uri",
    "questions_asked",
    "refresh_pages",
    "register",
    "request_digest",
    "run_page",
    "scores_of",
    "ui_command",
]
