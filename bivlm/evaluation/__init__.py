"""Benchmarks, their metrics, and one generation loop. A benchmark is one file here and registers by being there."""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    """Import `load_model`, which models that are registered in MLflow take from here when they are served."""
    if name != "load_model":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from bivlm.evaluation.generation import load_model

    return load_model
