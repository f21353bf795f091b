"""Addresses for people hold no secret, addresses of files lead to them, and this machine is reached without a proxy."""

import sqlite3
import string

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sqlalchemy import create_engine

from bivlm.addresses import keep_loopback_direct, sqlite_address, text_without_credentials, without_credentials
from bivlm.errors import InputError
from bivlm.names import check_address, check_proxies

# Without letters of the hosts below, so that a part of a secret in the output comes from the secret.
_CHARACTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789/@#?%&=:+!$~._-"
SECRETS = st.text(_CHARACTERS, min_size=4, max_size=40)
SCHEMES = st.sampled_from(["http", "https", "s3", "postgresql", "postgresql+psycopg2", "mysql", "tcp", "ray", "HTTPS"])
PARAMETERS = st.sampled_from(
    ["X-Amz-Signature", "token", "access_token", "password", "X-Amz-Credential", "sig", "apikey"]
)
PATHS = st.sampled_from(["", "/", "/api", "/bucket/prefix", "/x?y=z", "?x=y"])


def parts(secret: str) -> set[str]:
    """Every part of four characters."""
    return {secret[at : at + 4] for at in range(len(secret) - 3)}


@given(SCHEMES, SECRETS, SECRETS, PATHS, st.booleans())
@example("https", "user", "AB/CD@EF#GH?IJ%KL", "/api", True)
@example("s3", "AKIA0123", "aB/+=@x", "/prefix", True)
def test_no_part_of_a_user_or_password_is_shown(scheme, user, secret, path, named):
    address = f"{scheme}://{f'{user}:' if named else ''}{secret}@host{path}"
    for shown in (without_credentials(address), text_without_credentials(f"'{address}': no answer, try again")):
        assert not [part for part in parts(secret) if part in shown.partition("://")[2]]
        assert "host" in shown or "***" in shown


@given(SCHEMES, PARAMETERS, SECRETS, PATHS)
@example("https", "token", "ABCD@EFGH", "")
def test_no_part_of_a_signed_query_is_shown(scheme, parameter, secret, path):
    address = f"{scheme}://host{path}{'&' if '?' in path else '?'}{parameter}={secret}"
    for shown in (without_credentials(address), text_without_credentials(f"cannot open {address} now")):
        assert not [part for part in parts(secret) if part in shown.replace(parameter, "")]


@given(SECRETS, SECRETS)
def test_bad_input_never_shows_credentials(user, secret):
    message = str(InputError(f"model 's3://{user}:{secret}@bucket/prefix': expected s3://bucket/prefix"))
    assert message.startswith("model 's3://") and message.endswith("expected s3://bucket/prefix")
    assert not [part for part in parts(secret) if part in message]


@pytest.mark.parametrize(
    "address",
    ["https://host:4200/api?x=1", "s3://bucket/a/b", "sqlite:////tmp/a@b?/mlflow.db", "file:///a@b", "/a@b", "a@b", ""],
)
def test_an_address_without_credentials_stays(address):
    assert without_credentials(address) == address


def test_an_at_sign_in_a_path_counts_as_the_end_of_a_password():
    assert without_credentials("s3://bucket/a@b") == "s3://b"


@pytest.mark.parametrize("password", ["to/ken", "to?ken", "to#ken"])
def test_a_password_that_no_client_would_understand_is_refused(password):
    with pytest.raises(InputError, match="PREFECT_API_URL https://host/api: found an @ after the host") as refused:
        check_address(f"https://user:{password}@host/api", "PREFECT_API_URL")
    assert "ken" not in str(refused.value)
    assert check_address("https://user:to%2Fken@host/api", "X") == "https://user:to%2Fken@host/api"


NAMES = st.text(string.ascii_letters + " ?#%:@&=+;,'\"\\äß猫~", min_size=1, max_size=12).filter(
    lambda name: name == name.strip()
)


@settings(deadline=None, max_examples=40)
@given(NAMES)
@example("a?b")
@example("a?mode=ro#x")
@example("50%3Fb")
def test_a_database_lies_where_its_path_says(tmp_path_factory, name):
    folder = tmp_path_factory.mktemp("databases") / name
    folder.mkdir()
    with create_engine(sqlite_address(folder / "x.db")).begin() as connection:
        connection.exec_driver_sql("create table found (x)")
    assert [path.relative_to(folder.parent) for path in folder.parent.rglob("*.db")] == [
        (folder / "x.db").relative_to(folder.parent)
    ]
    assert sqlite3.connect(folder / "x.db").execute("select name from sqlite_master").fetchall() == [("found",)]


def test_an_ordinary_path_has_the_address_that_it_always_had(tmp_path):
    assert sqlite_address(tmp_path / "a b#c%20d" / "mlflow.db") == f"sqlite:///{tmp_path}/a b#c%20d/mlflow.db"


@pytest.mark.parametrize(
    ("before", "hosts"),
    [
        ({}, None),
        ({"NO_PROXY": "example.org"}, None),
        ({"HTTP_PROXY": "http://proxy"}, "127.0.0.1,localhost,::1"),
        ({"all_proxy": "x", "NO_PROXY": "a, b", "no_proxy": "c,localhost"}, "a,b,c,localhost,127.0.0.1,::1"),
        ({"all_proxy": "x", "NO_PROXY": "*", "no_proxy": "c"}, "*"),
    ],
)
def test_a_proxy_is_not_for_this_machine(before, hosts):
    environment = dict(before)
    keep_loopback_direct(environment)
    assert environment == before | ({} if hosts is None else {"NO_PROXY": hosts, "no_proxy": hosts})


@pytest.mark.parametrize("name", ["ALL_PROXY", "http_proxy"])
@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("socks5://me:secret@127.0.0.1:9", r"socks5://127.0.0.1:9: SOCKS needs the package socksio"),
        ("socks://127.0.0.1:9", "expected an address with http://"),
    ],
)
def test_a_proxy_that_no_client_can_use_is_named(name, address, message, monkeypatch):
    monkeypatch.setattr("bivlm.names.find_spec", lambda _: None)
    with pytest.raises(InputError, match=f"^{name} .*{message}") as refusal:
        check_proxies({name: address})
    assert "secret" not in str(refusal.value)


@pytest.mark.parametrize("address", ["", "127.0.0.1:3128", "http://proxy:3128", "HTTPS://proxy"])
def test_other_proxies_are_left_to_the_clients(address):
    check_proxies({"ALL_PROXY": address})
