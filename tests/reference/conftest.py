"""What several tests of the reference model share."""

import pytest

from bivlm.reference.tokenizer import build_tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    """The tokenizer as training builds it."""
    return build_tokenizer()
