"""A compression in MLflow: one parent run, a child run per evaluation, the model, its version and its champion.

Every task finds what an earlier attempt has written and adds what is missing: each may be retried, and the same request
again leaves no second trace.
"""
# ruff: noqa: F401

from tasks.tracking.models import facts_of, log_base_model, log_model, questions_asked, register, scores_of
from tasks.tracking.promotion import apply_decision, refresh_pages
from tasks.tracking.record import log_comparison, log_compression, log_documents, log_evaluation, other_points
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
