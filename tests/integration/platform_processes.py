"""What stands around the servers: workers as processes, Prefect asked over its API, PostgreSQL looked at."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import httpx
import psutil
import psycopg2

from infra.stack import Servers

T = TypeVar("T")
ROOT = Path(__file__).parents[2]
ENDED = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}


def until(what: str, look: Callable[[], T | None], seconds: float = 180) -> T:
    """What `look` returns once that is something; fails with `what` was waited for."""
    deadline = time.monotonic() + seconds
    while True:
        found = look()
        if found:
            return found
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s for {what}"
        time.sleep(0.1)


def client_environment(servers: Servers, home: Path, **more: str) -> dict[str, str]:
    """The environment of somebody who uses the servers: what this process has of its own, with the stack's over it."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT", "MLFLOW", "AWS"))}
    mine = {
        "PREFECT_HOME": str(home / "prefect"),
        "BIVLM_CACHE": str(home / "cache"),
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    return kept | servers.environment | mine | more


def secrets_of(servers: Servers) -> list[str]:
    """Every secret of a stack, from the file that holds them."""
    return list(json.loads((servers.folder / "settings.json").read_text())["secrets"].values())


class Worker:
    """`prefect worker start` for one pool, and the runs that it has started; killed and started as a test likes."""

    def __init__(self, servers: Servers, pool: str, home: Path, **environment: str) -> None:
        self.log = home / f"worker-{pool}.log"
        home.mkdir(parents=True, exist_ok=True)
        self._pool, self._environment = pool, client_environment(servers, home, **environment)
        self._process: psutil.Popen | None = None

    def start(self) -> Worker:
        command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", self._pool, "--type", "process"]
        with self.log.open("ab") as log:
            self._process = psutil.Popen(
                command, cwd=ROOT, env=self._environment, stdout=log, stderr=log, start_new_session=True
            )
        return self

    def kill(self) -> None:
        """At once, with every run that it has started, as when the machine is lost."""
        if self._process is not None:
            family = [self._process, *self._process.children(recursive=True)]
            for process in family:
                try:
                    process.kill()
                except psutil.NoSuchProcess:
                    continue
            psutil.wait_procs(family, timeout=10)
            self._process = None


class Api:
    """Prefect's and MLflow's, over HTTP, as a program of somebody else would ask them."""

    def __init__(self, servers: Servers, home: Path) -> None:
        self._servers, self._home, self._prefect = servers, home, httpx.Client(timeout=30)

    @property
    def environment(self) -> dict[str, str]:
        """With the secrets of now: a test may have had them rotated."""
        return client_environment(self._servers, self._home)

    def bivlm(self, *arguments: str, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
        """`bivlm` from the top of the repository, as a client of the servers."""
        done = subprocess.run(
            [sys.executable, "-m", "flows.cli", *arguments],
            cwd=ROOT,
            env=self.environment | environment,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done

    def deploy_all(self) -> str:
        """The pools, all deployments of prefect.yaml, automations: as the runbook does it."""
        environment = self.environment | {"PYTHON": sys.executable}
        done = subprocess.run([ROOT / "infra" / "deploy.sh"], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def run(self, deployment: str, parameters: Mapping[str, Any]) -> str:
        """Start a run of FLOW/DEPLOYMENT; returns its id."""
        found = self.ask("GET", f"/deployments/name/{deployment}")
        made = self.ask("POST", f"/deployments/{found['id']}/create_flow_run", json={"parameters": dict(parameters)})
        return made["id"]

    def state(self, run: str) -> dict[str, Any]:
        """The state of a flow run: type, name, message."""
        return self.ask("GET", f"/flow_runs/{run}")["state"]

    def wait(self, run: str, seconds: float = 900) -> dict[str, Any]:
        """The state in which a flow run has ended."""

        def ended() -> dict[str, Any] | None:
            state = self.state(run)
            return state if state["type"] in ENDED else None

        return until(f"the end of flow run {run}", ended, seconds)

    def runs_of(self, deployment: str) -> list[dict[str, Any]]:
        """All runs of FLOW/DEPLOYMENT, oldest first."""
        found = self.ask("GET", f"/deployments/name/{deployment}")
        wanted = {"deployments": {"id": {"any_": [found["id"]]}}, "sort": "EXPECTED_START_TIME_ASC"}
        return self.ask("POST", "/flow_runs/filter", json=wanted)

    def messages(self, run: str) -> str:
        """What a flow run has logged."""
        wanted = {"logs": {"flow_run_id": {"any_": [run]}}, "limit": 200}
        return "\n".join(line["message"] for line in self.ask("POST", "/logs/filter", json=wanted))

    def ask(self, method: str, path: str, **options: Any) -> Any:
        known = self._servers.environment
        name, _, password = known["PREFECT_API_AUTH_STRING"].partition(":")
        answer = self._prefect.request(method, known["PREFECT_API_URL"] + path, auth=(name, password), **options)
        assert answer.is_success, f"{method} {path}: {answer.status_code} {answer.text}"
        return answer.json() if answer.content else None

    def rows(self, database: str, query: str) -> list[tuple[Any, ...]]:
        """What PostgreSQL itself answers, to the owner of the database."""
        admin = self._servers.admin_environment
        found = psycopg2.connect(host=admin["PGHOST"], port=admin["PGPORT"], user=admin["PGUSER"], dbname=database)
        try:
            with found.cursor() as cursor:
                cursor.execute(query)
                return cursor.fetchall()
        finally:
            found.close()
