"""The tensors of a Hugging Face checkpoint one at a time, and the packed checkpoint that is made of them.

`resolving` finds a model by folder or hub id, with `downloading` going on where an earlier download was cut short;
`reading` opens a folder, `linears` says which of its tensors are linear weights and of what component, `writing` makes
the packed folder, `tensor_file` knows the safetensors format.
"""

from bivlm.checkpoint.linears import Anatomy, LeftAlone, Linear, anatomy, linears, select
from bivlm.checkpoint.reading import LINEAGE, REPORT, TABLES_KEY, Checkpoint, Digests, digest_of_files
from bivlm.checkpoint.resolving import ResolvedModel, resolve_model
from bivlm.checkpoint.tensor_file import TensorEntry
from bivlm.checkpoint.writing import check_loads, check_output, write_packed_checkpoint

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
    "check_loads",
    "check_output",
    "digest_of_files",
    "linears",
    "resolve_model",
    "select",
    "write_packed_checkpoint",
]
