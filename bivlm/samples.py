"""The earlier name of `bivlm.sources.samples`: models that are registered in MLflow import it when they are served."""

from bivlm.sources.samples import VqaSample

__all__ = ["VqaSample"]
