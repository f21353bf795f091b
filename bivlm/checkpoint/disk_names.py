"""Find where packed weights are on disk, from names and lengths alone.

transformers knows for certain under what name it loads a tensor, but takes seconds to import. Its rules change the
beginning of a name, so that the end and the length of the tensor identify it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from bivlm.checkpoint.reading import Checkpoint

_SUFFIX = ".weight"


def packed_disk_names(checkpoint: Checkpoint) -> dict[str, str] | None:
    """Return the name on disk of every packed weight by its name in the loaded model.

    None where names do not decide: ask `bivlm.checkpoint.linears.anatomy` then.
    """
    on_disk = {
        entry.name.removesuffix(_SUFFIX): entry.nbytes
        for entry in checkpoint.entries.values()
        if entry.dtype == "U8" and len(entry.shape) == 1 and entry.name.endswith(_SUFFIX)
    }
    pairs = pair_names(checkpoint.packed, on_disk)
    return None if pairs is None else {name: f"{other}{_SUFFIX}" for name, other in pairs.items()}


def pair_names(one: Mapping[str, int], other: Mapping[str, int]) -> dict[str, str] | None:
    """Pair the names of two mappings to lengths: of equal length, and of the longest common end in whole parts.

    None unless every name of both has exactly one partner.
    """
    left, right, pairs = dict(one), dict(other), {}
    for depth in range(max((name.count(".") + 1 for name in left), default=0), 0, -1):
        mine, theirs = _by_end(left, depth), _by_end(right, depth)
        for end in mine.keys() & theirs.keys():
            if len(mine[end]) > 1 or len(theirs[end]) > 1:
                return None
            (name,), (partner,) = mine[end], theirs[end]
            pairs[name] = partner
            del left[name], right[partner]
    return None if left or right else pairs


def _by_end(lengths: Mapping[str, int], depth: int) -> dict[tuple[int, tuple[str, ...]], list[str]]:
    """Return names of `depth` parts or more by their length and their last parts."""
    found = defaultdict(list)
    for name, nbytes in lengths.items():
        parts = name.split(".")
        if len(parts) >= depth:
            found[nbytes, tuple(parts[-depth:])].append(name)
    return found
