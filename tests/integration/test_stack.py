"""The four servers as processes: passwords, kills, backup and restore, rotation."""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
import signal
import subprocess
import sys
from pathlib import Path

import boto3
import httpx
import psycopg2
import pytest
from botocore.exceptions import ClientError

from infra.settings import NAMES
from infra.stack import Servers
from tests.flows.running import command_lines
from tests.integration.platform_processes import client_environment, secrets_of, until

pytestmark = pytest.mark.integration
INFRA = Path(__file__).parents[2] / "infra"


class Clients:
    """Every server's own client, with the credentials that `environment` holds."""

    def __init__(self, environment: dict[str, str]) -> None:
        account = environment["MLFLOW_TRACKING_USERNAME"], environment["MLFLOW_TRACKING_PASSWORD"]
        self.mlflow = httpx.Client(
            base_url=f"{environment['MLFLOW_TRACKING_URI']}/api/2.0/mlflow", auth=account, timeout=30
        )
        account = tuple(environment["PREFECT_API_AUTH_STRING"].split(":"))
        self.prefect = httpx.Client(base_url=environment["PREFECT_API_URL"], auth=account, timeout=30)
        self.s3 = boto3.Session(
            environment["AWS_ACCESS_KEY_ID"], environment["AWS_SECRET_ACCESS_KEY"], region_name="us-east-1"
        ).client("s3", endpoint_url=environment["AWS_ENDPOINT_URL"])

    def write(self, name: str) -> None:
        """Something named `name` into every server."""
        assert self.mlflow.post("/experiments/create", json={"name": name}).status_code == 200
        assert self.prefect.post("/variables/", json={"name": name, "value": name}).status_code == 201
        self.s3.put_object(Bucket="bivlm", Key=name, Body=name.encode())

    def holds(self, name: str) -> bool:
        """Whether every server holds what `write` has written."""
        found = self.mlflow.get("/experiments/get-by-name", params={"experiment_name": name})
        variable = self.prefect.get(f"/variables/name/{name}")
        body = self.s3.get_object(Bucket="bivlm", Key=name)["Body"].read()
        return found.status_code == 200 and variable.json()["value"] == name and body == name.encode()

    def let_in(self) -> list[str]:
        """The servers that accept the credentials."""
        try:
            self.s3.head_bucket(Bucket="bivlm")
            s3 = True
        except ClientError as error:
            assert error.response["ResponseMetadata"]["HTTPStatusCode"] == 403
            s3 = False
        mlflow = self.mlflow.get("/experiments/search", params={"max_results": 1}).status_code
        prefect = self.prefect.post("/flows/count").status_code
        assert {mlflow, prefect} <= {200, 401}
        answers = {"s3": s3, "mlflow": mlflow == 200, "prefect": prefect == 200}
        return [name for name, answer in answers.items() if answer]


def as_administrator(servers: Servers, *command: str) -> str:
    """What a command prints that is run as the runbook runs it."""
    sourced = f". {servers.folder}/admin.env && exec " + " ".join(command)
    done = subprocess.run(["sh", "-c", sourced], capture_output=True, text=True, env=os.environ | rclone_on_path())
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def rclone_on_path() -> dict[str, str]:
    from infra.surroundings import rclone

    return {"PATH": f"{Path(rclone()).parent}:{os.environ['PATH']}"}


def test_all_servers_let_in_who_has_the_credentials_and_nobody_else(stack):
    assert Clients(stack.environment).let_in() == ["s3", "mlflow", "prefect"]
    wrong = stack.environment | {
        "AWS_SECRET_ACCESS_KEY": "wrong",
        "MLFLOW_TRACKING_PASSWORD": "wrong",
        "PREFECT_API_AUTH_STRING": "bivlm:wrong",
    }
    assert Clients(wrong).let_in() == []


def test_databases_open_with_a_password_only_and_never_for_the_superuser(stack):
    port = stack.address("postgres").rpartition(":")[2]
    for user, password, reason in (("mlflow", "wrong", "password authentication failed"), ("postgres", "", "rejects")):
        with pytest.raises(psycopg2.OperationalError, match=reason):
            psycopg2.connect(host="127.0.0.1", port=port, user=user, password=password, dbname="mlflow")
    assert as_administrator(stack, "psql", "-XAtqc", "'select 1'", "prefect") == "1"


def test_no_secret_is_in_a_command_line_or_a_log(stack):
    Clients(stack.environment).let_in()
    shown = "\n".join(command_lines())
    assert str(stack.folder) in shown  # so that they were really read
    logs = "\n".join(stack.log(name).read_text(errors="replace") for name in NAMES)
    for secret in secrets_of(stack):
        assert secret not in shown
        assert secret not in logs
    for name in ("env", "admin.env", "settings.json"):
        assert (stack.folder / name).stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("name", NAMES)
def test_a_server_that_is_killed_is_started_again_alone_and_has_lost_nothing(stack, name):
    clients = Clients(stack.environment)
    clients.write(f"before_{name}")
    stack.kill(name)
    assert [other for other in NAMES if stack.running(other)] == [other for other in NAMES if other != name]
    stack.start([name])
    # Whoever had a connection to it finds it again by itself, at the latest on the second attempt.
    for _ in range(2):
        try:
            held = clients.holds(f"before_{name}")
        except (httpx.TransportError, KeyError):
            continue
    assert held
    clients.write(f"after_{name}")
    assert clients.holds(f"after_{name}")


def test_a_backup_of_a_stack_at_work_is_restored_into_a_new_one(stack, second_stack, tmp_path):
    Clients(stack.environment).write("precious")
    backup = as_administrator(stack, str(INFRA / "backup.sh"), str(tmp_path / "backups"))
    assert sorted(path.name for path in Path(backup).iterdir()) == ["mlflow.dump", "mlflow_auth.dump", "prefect.dump"]
    Clients(stack.environment).write("after_the_backup")

    second_stack.start(["postgres", "s3"])
    as_administrator(second_stack, str(INFRA / "restore.sh"), backup)
    second_stack.start()
    clients = Clients(second_stack.environment)
    assert clients.let_in() == ["s3", "mlflow", "prefect"]  # with the new stack's own passwords
    assert clients.holds("precious")
    assert clients.mlflow.get("/experiments/get-by-name", params={"experiment_name": "after_the_backup"}).is_error
    clients.write("after_the_restore")
    assert clients.holds("after_the_restore")


def test_a_restore_under_running_servers_is_refused(stack, tmp_path):
    backup = as_administrator(stack, str(INFRA / "backup.sh"), str(tmp_path / "backups"))
    with pytest.raises(AssertionError, match="the databases are in use"):
        as_administrator(stack, str(INFRA / "restore.sh"), backup)


def test_rotated_secrets_replace_the_old_ones_everywhere_and_nothing_is_lost(stack):
    before, old = Clients(stack.environment), secrets_of(stack)
    before.write("before_rotation")
    stack.rotate()
    assert before.let_in() == []
    after = Clients(stack.environment)
    assert after.let_in() == ["s3", "mlflow", "prefect"]
    assert after.holds("before_rotation")
    assert not set(old) & set(secrets_of(stack))
    port = stack.address("postgres").rpartition(":")[2]
    for user, password in (("mlflow", old[0]), ("prefect", old[1])):
        with pytest.raises(psycopg2.OperationalError, match="password authentication failed"):
            psycopg2.connect(host="127.0.0.1", port=port, user=user, password=password, dbname=user)


def test_the_administrators_password_of_a_container_is_replaced_as_the_others_are(second_stack, tmp_path):
    """It stands in POSTGRES_PASSWORD, which PostgreSQL's image itself reads when the volume is new."""
    second_stack.start(["postgres"])
    ask = ["psql", "-XAtqc", "\"select rolpassword from pg_authid where rolname = 'postgres'\"", "postgres"]
    script = str(INFRA / "postgres" / "databases.sh")
    assert as_administrator(second_stack, *ask) == ""  # a process has none: it is reached through its folder
    for password in ("first 'password'", "second"):
        for name in ("POSTGRES_PASSWORD", "MLFLOW_DATABASE_PASSWORD", "PREFECT_DATABASE_PASSWORD"):
            (tmp_path / name).write_text(password)
        as_administrator(second_stack, f"env SECRETS_FOLDER={tmp_path} {script}")
        stored = as_administrator(second_stack, *ask)
        assert is_scram_of(password, stored) and not is_scram_of("another", stored)
        assert password not in second_stack.log("postgres").read_text()


def is_scram_of(password: str, stored: str) -> bool:
    """Whether PostgreSQL keeps this password: RFC 5803."""
    _, iterations, salt, stored_key, _ = stored.replace("$", ":").split(":")
    salted = hashlib.pbkdf2_hmac("sha256", password.encode(), base64.b64decode(salt), int(iterations))
    client_key = hmac.digest(salted, b"Client Key", "sha256")
    return base64.b64decode(stored_key) == hashlib.sha256(client_key).digest()


def test_a_run_that_does_not_begin_is_marked_as_crashed_and_one_that_does_is_not(stack, tmp_path):
    def renew(arguments: str) -> None:
        make = f"from datetime import timedelta; from infra import automations as a; a.renew(a.stuck_runs({arguments}))"
        environment = client_environment(stack, tmp_path)
        subprocess.run([sys.executable, "-c", make], env=environment, check=True, cwd=INFRA.parent)

    renew("timedelta(seconds=10)")
    try:
        watch_runs(stack)
    finally:
        renew("")  # with its real patience, for the tests that follow


def watch_runs(stack: Servers) -> None:
    prefect = Clients(stack.environment).prefect
    flow = prefect.post("/flows/", json={"name": "stands-still"}).json()["id"]

    def run_through(*states: str) -> str:
        run = prefect.post("/flow_runs/", json={"flow_id": flow, "state": {"type": "SCHEDULED"}}).json()["id"]
        for name in states:
            kind = "PENDING" if name == "InfrastructurePending" else name
            state = {"type": kind, "name": name if kind != name else None}
            assert prefect.post(f"/flow_runs/{run}/set_state", json={"state": state}).is_success
        return run

    def state_of(run: str) -> dict:
        return prefect.get(f"/flow_runs/{run}").json()["state"]

    at_work = run_through("PENDING", "RUNNING")
    stuck = [run_through("PENDING"), run_through("PENDING", "InfrastructurePending")]
    for run in stuck:
        state = until("the end of a run that stands still", lambda run=run: found(state_of(run)), 90)
        assert state["type"] == "CRASHED" and "did not begin within 10 s" in state["message"]
    assert state_of(at_work)["type"] == "RUNNING"


def found(state: dict) -> dict | None:
    return None if state["type"] == "PENDING" else state


def test_a_rotation_in_another_shell_leaves_run_at_work_which_ends_the_new_servers(second_stack):
    folder = second_stack.folder
    command = [sys.executable, "-u", "-m", "infra.servers"]
    with subprocess.Popen(
        [*command, "run", "--folder", folder], cwd=INFRA.parent, stdout=subprocess.PIPE, text=True
    ) as shell:
        try:
            assert any("Ctrl-C ends them" in line for line in shell.stdout)
            old = secrets_of(second_stack)
            subprocess.run([*command, "rotate", "--folder", folder], cwd=INFRA.parent, check=True)
            assert not set(old) & set(secrets_of(second_stack))
            assert Clients(second_stack.environment).let_in() == ["s3", "mlflow", "prefect"]
            assert shell.poll() is None
        finally:
            shell.send_signal(signal.SIGINT)
        assert "ending the servers" in shell.communicate(timeout=120)[0]
    assert not any(map(second_stack.running, NAMES))
    assert str(folder) not in "\n".join(command_lines())


def test_another_process_finds_the_servers_of_a_folder_and_keeps_their_ports(stack):
    again = Servers(stack.folder)
    assert all(map(again.running, NAMES))
    assert again.environment == stack.environment
