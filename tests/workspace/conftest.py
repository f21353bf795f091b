import pytest
from s3_server import s3_endpoint, s3_location  # noqa: F401  fixtures

from bivlm.workspace.steps import Workspace


@pytest.fixture(params=["folder", "s3"])
def location(request, tmp_path):
    """Where a workspace may be: a folder and an S3 prefix must behave alike."""
    if request.param == "s3":
        return request.getfixturevalue("s3_location")
    return str(tmp_path / "workspace")


@pytest.fixture
def workspace(location):
    return Workspace.open(location)
