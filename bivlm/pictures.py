"""The earlier name of `bivlm.sources.images`: models that are registered in MLflow import it when they are served."""

from bivlm.sources.images import decode_image as decode_picture

__all__ = ["decode_picture"]
