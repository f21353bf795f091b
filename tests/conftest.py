"""What several rooms' tests share: a tiny checkpoint, packed by the simplest codec there could be."""

import shutil
from pathlib import Path

import pytest
from torchvision_operators import define_missing

define_missing()

from raw_codec import pack_linears  # noqa: E402
from tiny_llava import make_tiny_llava  # noqa: E402

from bivlm.checkpoint.linears import linears  # noqa: E402
from bivlm.checkpoint.reading import Checkpoint  # noqa: E402
from bivlm.checkpoint.writing import write_packed_checkpoint  # noqa: E402
from bivlm.recipe.loading import parse_recipe  # noqa: E402
from bivlm.recipe.selection import select  # noqa: E402

METHOD = {"method": "bivlm", "groups": 2, "p_max": 0.05}


@pytest.fixture(scope="session")
def tiny_llava(tmp_path_factory) -> Path:
    """A random full-precision checkpoint; do not write to it."""
    return make_tiny_llava(tmp_path_factory.mktemp("tiny") / "llava")


@pytest.fixture(scope="session")
def whole_recipe():
    """Packs every linear of every component but the head."""
    return parse_recipe({"name": "whole", "format": 1, "components": dict.fromkeys(_COMPONENTS, METHOD)})


@pytest.fixture(scope="session")
def _packed_once(tiny_llava, whole_recipe, tmp_path_factory) -> Path:
    checkpoint = Checkpoint.open(tiny_llava)
    chosen, _ = select(linears(checkpoint), whole_recipe)
    packed = pack_linears(checkpoint, chosen)
    return write_packed_checkpoint(checkpoint, packed, chosen, tmp_path_factory.mktemp("packed") / "llava", {})


@pytest.fixture
def packed_llava(_packed_once, tmp_path) -> Path:
    """The tiny checkpoint with every linear but the head packed; a copy that may be damaged."""
    return Path(shutil.copytree(_packed_once, tmp_path / "packed"))


@pytest.fixture(scope="session")
def tokenizer():
    """The reference model's tokenizer as training builds it."""
    from bivlm.reference.tokenizer import build_tokenizer

    return build_tokenizer()


_COMPONENTS = ("vision", "adaptor", "language")
