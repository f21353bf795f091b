"""An S3 server in this process, for tests; import the fixtures into a conftest."""

import os

import boto3
import pytest
from moto.server import ThreadedMotoServer

from tests.servers import forget_s3_clients


@pytest.fixture(scope="session")
def s3_endpoint():
    """The address of an S3 server in this process, and the environment that leads boto3 to it."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    environment = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    forget_s3_clients()
    boto3.client("s3").create_bucket(Bucket="bivlm-tests")
    yield environment["AWS_ENDPOINT_URL"]
    for name, value in before.items():
        if value is None:
            del os.environ[name]
        else:
            os.environ[name] = value
    server.stop()


@pytest.fixture
def s3_location(s3_endpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("BIVLM_CACHE", str(tmp_path / "cache"))
    return f"s3://bivlm-tests/{tmp_path.name}"
