"""Settings of the orchestrator and its companions for people at a terminal."""

from __future__ import annotations

import os
import warnings

# What the user has set is respected. Errors reach the terminal through the command itself, hence CRITICAL.
_SETTINGS = {
    "PREFECT_LOGGING_LEVEL": "CRITICAL",
    "PREFECT_SERVER_LOGGING_LEVEL": "CRITICAL",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "600",  # on a machine that is busy with other work
    "DASK_DISTRIBUTED__LOGGING__DISTRIBUTED": "critical",
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "TRANSFORMERS_VERBOSITY": "error",
}


def quieten() -> None:
    """Let Prefect, MLflow and transformers speak only when something is wrong, and reach this machine without a proxy.

    To be called before any of them is imported.
    """
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    from bivlm.addresses import keep_loopback_direct  # takes transformers with it

    keep_loopback_direct()
    # MLflow advises an input example and type hints; the model has a signature, which says the same.
    warnings.filterwarnings("ignore", category=UserWarning, module=r"mlflow\.pyfunc")


def hide_loading_bars() -> None:
    """Hide transformers' bars for every model that is loaded; those of downloads stay."""
    from huggingface_hub import constants
    from huggingface_hub.utils import enable_progress_bars
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # which takes the hub's with it
    if not constants.HF_HUB_DISABLE_PROGRESS_BARS:
        enable_progress_bars()
