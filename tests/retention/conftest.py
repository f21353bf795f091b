import pytest
from s3_server import s3_endpoint, s3_location  # noqa: F401  fixtures


@pytest.fixture(params=["folder", "s3"])
def location(request, tmp_path):
    """Where a workspace may be."""
    if request.param == "s3":
        return request.getfixturevalue("s3_location")
    return str(tmp_path / "workspace")
