"""What an S3 server or boto3 refuses is one line: bad input stays, what may be over in a moment is tried again."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from bivlm.errors import InputError, describe
from bivlm.sources.s3_models import list_models, list_prefix
from bivlm.workspace.stores.opening import open_store
from bivlm.workspace.stores.s3 import S3Refusal, S3Store, s3_client
from tasks.runtime.policy import is_passing

LASTING = {
    (301, "PermanentRedirect"): "set AWS_DEFAULT_REGION",
    (400, "AuthorizationHeaderMalformed"): "set AWS_DEFAULT_REGION",
    (400, "ExpiredToken"): "renew the credentials",
    (400, "InvalidBucketName"): "InvalidBucketName",
    (400, "InvalidRequest"): "HTTP 400",
    (403, "AccessDenied"): "AccessDenied",
    (403, "RequestTimeTooSkewed"): "RequestTimeTooSkewed",
    (404, "NoSuchBucket"): "NoSuchBucket",
    (405, "MethodNotAllowed"): "HTTP 405",
    (412, "PreconditionFailed"): "HTTP 412",
    (501, "NotImplemented"): "HTTP 501",
}
BUSY = [
    (409, "OperationAborted"),
    (500, "InternalError"),
    (503, "SlowDown"),
    (503, "ServiceUnavailable"),
    (429, "Slow"),
]


class Answers(BaseHTTPRequestHandler):
    """The same refusal to whatever is asked."""

    protocol_version = "HTTP/1.1"

    def answer(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.asked += 1
        status, code = self.server.refusal
        body = b"" if self.command == "HEAD" else f"<Error><Code>{code}</Code><Message>told</Message></Error>".encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = answer

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def _server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    server.asked, server.refusal, server.client = 0, (200, ""), None
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()


@pytest.fixture
def server(_server, monkeypatch, tmp_path):
    monkeypatch.setenv("BIVLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{_server.server_port}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setattr("botocore.endpoint.time.sleep", lambda seconds: None)  # boto3's pauses between its attempts
    _server.refusal = (200, "")
    return _server


def actions(store: S3Store, file) -> dict:
    return {
        "put a file": lambda: store.put_file("a", file),
        "put bytes": lambda: store.put_bytes("a", b"x"),
        "read": lambda: store.read_bytes("a"),
        "entries": lambda: list(store.entries("steps")),
        "delete": lambda: store.delete("a"),
        "a model's files": lambda: list_prefix("s3://bucket/model"),
        "models": lambda: list_models("s3://bucket/models"),
    }


@pytest.fixture
def one_client(server, monkeypatch):
    """All requests of this module go through one client, because making one takes long."""
    if server.client is None:
        server.client = s3_client()
    for module in ("bivlm.workspace.stores.s3", "bivlm.sources.s3_models"):
        monkeypatch.setattr(f"{module}.s3_client", lambda: server.client)
    return server


@pytest.mark.parametrize(("status", "code"), [*LASTING, *BUSY])
def test_what_s3_refuses_is_told_in_one_line_and_tried_again_if_it_may_be_over(one_client, tmp_path, status, code):
    busy, said = (status, code) in BUSY, LASTING.get((status, code), "S3 answers")
    store = open_store("s3://bucket/work")
    (tmp_path / "file").write_bytes(b"x")
    one_client.refusal = (status, code)
    for name, act in actions(store, tmp_path / "file").items():
        one_client.asked = 0
        with pytest.raises(ConnectionError if busy else (InputError, S3Refusal)) as raised:
            act()
        told = describe(raised.value)
        assert "\n" not in told and f"HTTP {status}" in told and said in told, name
        assert is_passing(raised.value) == busy, name
        if not busy and status not in (301, 400):  # after these boto3 asks for the bucket's region
            assert one_client.asked == 1, name
    with pytest.raises(ConnectionError if busy else InputError) as raised:
        open_store("s3://bucket/work")
    told = describe(raised.value)
    assert "workspace s3://bucket/work: bucket 'bucket' cannot be opened" in told and "\n" not in told


def test_an_object_that_is_not_there_is_no_trouble(one_client):
    store = open_store("s3://bucket/work")
    one_client.refusal = (404, "NoSuchKey")
    assert (store.read_bytes("a"), store.entry("a"), store.path("a")) == (None, None, None)


SETTINGS = {
    "no credentials": ({"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None}, "credentials", InputError),
    "half the credentials": ({"AWS_SECRET_ACCESS_KEY": None}, "credentials", InputError),
    "no such profile": ({"AWS_PROFILE": "nonesuch"}, "nonesuch", InputError),
    "an endpoint without a scheme": ({"AWS_ENDPOINT_URL": "127.0.0.1:9000"}, "endpoint", InputError),
    "a password no client reads": ({"AWS_ENDPOINT_URL": "http://u:s3/cr3t@host"}, "AWS_ENDPOINT_URL", InputError),
    "nobody there": ({"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, "EndpointConnectionError", ConnectionError),
    "a region that is none": ({"AWS_DEFAULT_REGION": "no region!"}, "region", InputError),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_settings_that_cannot_be_are_told_in_one_line(server, monkeypatch, tmp_path, case):
    settings, said, kind = SETTINGS[case]
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    for name, value in settings.items():
        if value is None:
            monkeypatch.delenv(name)
        else:
            monkeypatch.setenv(name, value)
    for act in (lambda: open_store("s3://bucket/work"), lambda: list_prefix("s3://bucket/model")):
        with pytest.raises(kind) as raised:
            act()
        told = describe(raised.value)
        assert said in told and "\n" not in told and "cr3t" not in told


@pytest.mark.parametrize("bucket", ["UPPER", "a", "under_score", "a b", "x" * 80, "-a-"])
def test_a_name_that_cannot_be_a_bucket_is_bad_input(server, bucket):
    server.refusal = (400, "InvalidBucketName")
    with pytest.raises(InputError) as raised:
        list_prefix(f"s3://{bucket}/model")
    assert "\n" not in str(raised.value)


def test_the_client_retries_by_itself_what_is_busy(server):
    server.refusal, server.asked = (503, "SlowDown"), 0
    with pytest.raises(Exception, match="SlowDown"):
        s3_client().get_object(Bucket="bucket", Key="a")
    assert server.asked == 6  # once, and five times again
