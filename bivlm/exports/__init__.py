"""Packed checkpoints in forms that other programs load."""

from __future__ import annotations

from pathlib import Path

FORMS = ("dense", "compressed-tensors", "gguf")


def export(folder: str | Path, output: str | Path, form: str) -> list[str]:
    """Write the packed checkpoint in `folder` to the new folder `output` in one of `FORMS`.

    Returns sentences about what is stored, and how. Raises `InputError` as the form's function.
    """
    if form == "dense":
        from bivlm.exports.dense import export_dense

        export_dense(folder, output)
        return []
    if form == "gguf":
        from bivlm.exports.gguf import export_gguf, summary

        return summary(export_gguf(folder, output))
    from bivlm.exports.compressed_tensors import export_compressed_tensors

    return export_compressed_tensors(folder, output)
