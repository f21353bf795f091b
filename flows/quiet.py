"""Settings of the orchestrator for people at a terminal: made before Prefect or MLflow is imported."""

from __future__ import annotations

import os

# What somebody has set is respected. Errors reach the terminal through the command itself, hence CRITICAL.
_SETTINGS = {
    "PREFECT_LOGGING_LEVEL": "CRITICAL",
    "PREFECT_SERVER_LOGGING_LEVEL": "CRITICAL",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}


def quieten() -> None:
    """Let Prefect, MLflow and transformers speak only when something is wrong; call it before they are imported."""
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
