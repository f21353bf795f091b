"""The tensors of a Hugging Face checkpoint one at a time, and the packed checkpoint that is made of them.

`reading` opens a folder, `linears` says which of its tensors are linear weights and of what component, `writing` makes
the packed folder, `tensor_file` knows the safetensors format.
"""

from bivlm.checkpoint.linears import Anatomy, LeftAlone, Linear, anatomy, linears, select
from bivlm.checkpoint.reading import (
    LINEAGE,
    REPORT,
    TABLES_KEY,
    Checkpoint,
    Digests,
    ResolvedModel,
    digest_of_files,
    resolve_model,
)
from bivlm.checkpoint.tensor_file import TensorEntry
from bivlm.checkpoint.writing import check_output, write_packed_checkpoint

__all__ = [
    "LINEAGE",
    "REPORT",
    "TABLES_KEY",
    "Anatomy",
    "Checkpoint",
    "Digests",
    "LeftAlone",
    "Linear",
    "ResolvedModel",
    "TensorEntry",
    "anatomy",
    "check_output",
    "digest_of_files",
    "linears",
    "resolve_model",
    "select",
    "write_packed_checkpoint",
]
