"""PostgreSQL, an S3 server, MLflow and Prefect as processes over one folder.

Everything lies in the folder: data, logs, and secrets, which are made once, readable by their owner only, and reach
the servers through their environment, never through a command line. Servers keep their ports; each can be killed and
started alone; nothing is lost by either.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock

from infra.processes import Note, ask_to_end, family, kill_all
from infra.settings import NAMES, Settings
from infra.surroundings import (
    HOST,
    ServerTrouble,
    answers,
    give,
    postgres_program,
    postgres_user,
    rclone,
    refuse_what_cannot_be_entered,
    run_to_end,
    write_privately,
)

BUCKETS = ("bivlm", "mlflow")  # the workspace's, and the artifacts'
ACCOUNT = "bivlm"  # of workers and people, in MLflow and Prefect
STARTUP_SECONDS = 180
PATIENCE = {"postgres": 30, "s3": 5, "mlflow": 15, "prefect": 15}  # seconds to end by itself
_HERE = Path(__file__).resolve().parent
_SOCKET_NAME_LIMIT = 107  # bytes, Linux
# What of our own environment no server is to see: it is configured by the folder alone.
_OURS = ("PREFECT_", "MLFLOW_", "_MLFLOW_", "AWS_", "PG", "RCLONE_", "BIVLM_")

# They ask one another, on this machine, where no proxy leads to.
_PROXIES = {"http_proxy", "https_proxy", "all_proxy"}
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
# In a shell, and for programs other than `bivlm`, which sees to it by itself.
_NO_PROXY = 'export NO_PROXY="127.0.0.1,localhost,::1${NO_PROXY:+,$NO_PROXY}"; export no_proxy="$NO_PROXY"\n'

Start = tuple[list[str], dict[str, str], dict[str, Any]]  # command, environment, options of Popen


class Servers:
    """The four servers over one folder; they outlive this object and are found again by the next one.

    Any number of these may be at work on one folder, in one program or several: what runs, ports and secrets are read
    from the folder, and starting, stopping and rotating are done `alone`.

    `ports` gives some or all of them by name; others are the usual ones where these are free (`usual`), else any. Once
    chosen, ports stay. Raises `ServerTrouble` if the folder holds something else.
    """

    def __init__(self, folder: str | Path, ports: Mapping[str, int] | None = None, *, usual: bool = False) -> None:
        self.folder = Path(folder).expanduser().absolute()
        for name in ("logs", "prefect", "run", "s3"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
            (self.folder / name).chmod(0o700)
        self._started: dict[str, subprocess.Popen] = {}  # only to be reaped: a note says which process a server is
        self.alone = FileLock(self.folder / "run" / "lock")
        Settings.read(self._settings_file, ports or {}, usual=usual)
        self._write_environments()

    def address(self, name: str) -> str:
        """Return the address of the server `name`, without credentials."""
        scheme = "postgresql" if name == "postgres" else "http"
        return f"{scheme}://{HOST}:{self._settings.ports[name]}"

    @property
    def environment(self) -> dict[str, str]:
        """What commands and workers need to use the servers: addresses and credentials."""
        known = self._settings.secrets
        return {
            "PREFECT_API_URL": f"{self.address('prefect')}/api",
            "PREFECT_API_AUTH_STRING": f"{ACCOUNT}:{known['prefect_api']}",
            "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "false",
            "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",  # seconds; infra.automations counts on it
            # Two minutes of patience, also with a server whose database is away, which answers 500.
            "PREFECT_CLIENT_MAX_RETRIES": "6",
            "PREFECT_CLIENT_RETRY_EXTRA_CODES": "500",
            "MLFLOW_TRACKING_URI": self.address("mlflow"),
            "MLFLOW_TRACKING_USERNAME": ACCOUNT,
            "MLFLOW_TRACKING_PASSWORD": known["mlflow_worker"],
            "AWS_ENDPOINT_URL": self.address("s3"),
            **_aws(known["s3_worker_key"], known["s3_worker_secret"]),
            "BIVLM_WORKSPACE": f"s3://{BUCKETS[0]}/workspace",
        }

    @property
    def admin_environment(self) -> dict[str, str]:
        """What backup.sh, restore.sh and an administrator need: psql's superuser, rclone's `stack:`, MLflow's admin."""
        known = self._settings.secrets
        return {
            "PGHOST": str(self._socket_folder),
            "PGPORT": str(self._settings.ports["postgres"]),
            "PGUSER": "postgres",
            "RCLONE_CONFIG": "/dev/null",
            "RCLONE_CONFIG_STACK_TYPE": "s3",
            "RCLONE_CONFIG_STACK_PROVIDER": "Rclone",
            "RCLONE_CONFIG_STACK_ENDPOINT": self.address("s3"),
            "RCLONE_CONFIG_STACK_ACCESS_KEY_ID": known["s3_worker_key"],
            "RCLONE_CONFIG_STACK_SECRET_ACCESS_KEY": known["s3_worker_secret"],
            "MLFLOW_TRACKING_URI": self.address("mlflow"),
            "MLFLOW_TRACKING_USERNAME": "admin",
            "MLFLOW_TRACKING_PASSWORD": known["mlflow_admin"],
        }

    def start(self, names: Iterable[str] = NAMES) -> Servers:
        """Start those of `names` that are not running, in order; returns when all of them answer.

        Raises `ServerTrouble` with the end of its log if one does not. The others are left running.
        """
        wanted = set(names)
        with self.alone:
            for group in (("postgres", "s3"), ("mlflow", "prefect")):  # those of a group start side by side
                fresh = [name for name in group if name in wanted and not self.running(name)]
                for name in fresh:
                    self._launch(name)
                for name in fresh:
                    self._wait(name)
                    if name == "postgres":
                        self._make_databases()
        return self

    def stop(self, names: Iterable[str] = NAMES) -> None:
        """Ask servers to end, the last started first, and wait; kill those that do not."""
        wanted = set(names)
        with self.alone:
            for name in (name for name in reversed(NAMES) if name in wanted):
                process = self._process(name)
                if process is not None:
                    everything = family(process)
                    # PostgreSQL's "fast": clients are cut off, everything is written.
                    ask_to_end(process, signal.SIGINT if name == "postgres" else signal.SIGTERM, PATIENCE[name])
                    self._end(name, process, everything)

    def kill(self, name: str) -> None:
        """End a server and what it started at once, without warning, as a power cut does."""
        process = self._process(name)
        if process is not None:
            self._end(name, process, family(process))

    def running(self, name: str) -> bool:
        """Return whether the process of the server `name` is alive."""
        return self._process(name) is not None

    def log(self, name: str) -> Path:
        """Return the file that the server `name` writes to."""
        return self.folder / "logs" / f"{name}.log"

    def rotate(self) -> None:
        """Make new secrets, and restart what is running with them; the old ones are refused.

        Interrupted at any moment, the next `start` or `rotate` puts it right: servers take what the settings say.
        """
        with self.alone:
            running = [name for name in NAMES if self.running(name)]
            settings = self._settings
            settings.renew()
            settings.write(self._settings_file)
            self._write_environments()
            self.stop()
            self.start(running)

    def _postgres(self) -> Start:
        user, data = postgres_user(), self.folder / "postgres"
        refuse_what_cannot_be_entered(self.folder, user)
        self._make_socket_folder(user)
        if not data.exists():
            self._make_cluster(data, user)
        settings = {
            "listen_addresses": HOST,
            "port": self._settings.ports["postgres"],
            "unix_socket_directories": self._socket_folder,
        }
        flags = [text for key, value in settings.items() for text in ("-c", f"{key}={value}")]
        return [postgres_program("postgres"), "-D", str(data), *flags], {}, user

    def _s3(self) -> Start:
        known = self._settings.secrets
        pairs = [f'"{known[f"s3_{who}_key"]},{known[f"s3_{who}_secret"]}"' for who in ("worker", "mlflow")]
        for bucket in BUCKETS:
            (self.folder / "s3" / bucket).mkdir(exist_ok=True)
        address = f"{HOST}:{self._settings.ports['s3']}"
        command = [rclone(), "serve", "s3", "--addr", address, "--vfs-cache-mode", "off", "--config", "/dev/null"]
        return [*command, str(self.folder / "s3")], {"RCLONE_AUTH_KEY": ",".join(pairs)}, {}

    def _mlflow(self) -> Start:
        known = self._settings.secrets
        environment = {
            "PGHOST": HOST,
            "PGPORT": str(self._settings.ports["postgres"]),
            "PGUSER": "mlflow",
            "PGPASSWORD": known["mlflow_database"],
            "MLFLOW_BACKEND_STORE_URI": "postgresql:///mlflow",
            "MLFLOW_ARTIFACTS_DESTINATION": f"s3://{BUCKETS[1]}",
            "MLFLOW_ADMIN_PASSWORD": known["mlflow_admin"],
            "MLFLOW_TRACKING_USERNAME": ACCOUNT,
            "MLFLOW_TRACKING_PASSWORD": known["mlflow_worker"],
            "MLFLOW_FLASK_SERVER_SECRET_KEY": known["mlflow_session"],
            # Nothing here uses them, and both would start processes of their own.
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "MLFLOW_ENABLE_AI_GATEWAY": "false",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_S3_ENDPOINT_URL": self.address("s3"),
            **_aws(known["s3_mlflow_key"], known["s3_mlflow_secret"]),
        }
        address = ["--host", HOST, "--port", str(self._settings.ports["mlflow"]), "--workers", "1"]
        return [sys.executable, str(_HERE / "mlflow" / "serve.py"), *address], environment, {}

    def _prefect(self) -> Start:
        known = self._settings.secrets
        account = f"{ACCOUNT}:{known['prefect_api']}"
        environment = {
            "PREFECT_HOME": str(self.folder / "prefect"),
            "PREFECT_API_URL": f"{self.address('prefect')}/api",  # for the server's own pages and services
            "PREFECT_SERVER_DATABASE_DRIVER": "postgresql+asyncpg",
            "PREFECT_SERVER_DATABASE_HOST": HOST,
            "PREFECT_SERVER_DATABASE_PORT": str(self._settings.ports["postgres"]),
            "PREFECT_SERVER_DATABASE_NAME": "prefect",
            "PREFECT_SERVER_DATABASE_USER": "prefect",
            "PREFECT_SERVER_DATABASE_PASSWORD": known["prefect_database"],
            "PREFECT_SERVER_API_AUTH_STRING": account,
            "PREFECT_API_AUTH_STRING": account,
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            # In PREFECT_HOME: held in memory, as is the default, a killed server would never free their places.
            "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
        }
        address = ["--host", HOST, "--port", str(self._settings.ports["prefect"])]
        return [sys.executable, "-m", "prefect", "server", "start", *address], environment, {}

    def _make_cluster(self, data: Path, user: dict[str, Any]) -> None:
        """Make an empty PostgreSQL cluster, under another name until it is whole, because initdb may be killed."""
        partial = self.folder / "postgres.partial"
        if partial.exists() and any(partial.iterdir()) and not (partial / "base").is_dir():
            raise ServerTrouble(f"{partial}: not left by initdb; move it, or choose another folder")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        give(partial, user)
        options = ["--username=postgres", "--encoding=UTF8", "--locale=C.UTF-8", "--data-checksums"]
        options += ["--auth-local=trust", "--auth-host=reject"]
        run_to_end([postgres_program("initdb"), "-D", str(partial), *options], **user)
        # The administrator comes through the socket, whose folder is the lock, and not through the network.
        rules = ("local all all trust", f"host all postgres {HOST}/32 reject", f"host all all {HOST}/32 scram-sha-256")
        (partial / "pg_hba.conf").write_text("\n".join(rules) + "\n")
        partial.rename(data)

    def _make_databases(self) -> None:
        known = self._settings.secrets
        passwords = {f"{name.upper()}_DATABASE_PASSWORD": known[f"{name}_database"] for name in ("mlflow", "prefect")}
        psql = {"PATH": f"{Path(postgres_program('psql')).parent}:{os.environ['PATH']}"}
        run_to_end([str(_HERE / "postgres" / "databases.sh")], self.admin_environment | passwords | psql)

    @property
    def _socket_folder(self) -> Path:
        return self.folder / "postgres-socket"

    def _make_socket_folder(self, user: dict[str, Any]) -> None:
        self._socket_folder.mkdir(exist_ok=True)
        give(self._socket_folder, user)
        name = self._socket_folder / f".s.PGSQL.{self._settings.ports['postgres']}.lock"
        if len(os.fsencode(name)) > _SOCKET_NAME_LIMIT:
            raise ServerTrouble(f"postgres: {name} is too long for a socket; expected a --folder with a shorter path")

    @property
    def _settings_file(self) -> Path:
        return self.folder / "settings.json"

    @property
    def _settings(self) -> Settings:
        return Settings.read(self._settings_file, {}, usual=False)  # as they are now: others may have rotated them

    def _write_environments(self) -> None:
        for name, variables in (("env", self.environment), ("admin.env", self.admin_environment)):
            lines = [f"export {key}={shlex.quote(value)}\n" for key, value in variables.items()]
            write_privately(self.folder / name, "".join(lines) + _NO_PROXY)

    def _launch(self, name: str) -> None:
        command, environment, options = getattr(self, f"_{name}")()
        port = self._settings.ports[name]
        if answers(port):
            raise ServerTrouble(f"{name}: port {port} is taken by another program; expected --port {name}=A_FREE_ONE")
        inherited = {
            key: value for key, value in os.environ.items() if not key.startswith(_OURS) and key.lower() not in _PROXIES
        }
        with self.log(name).open("ab") as log:
            process = subprocess.Popen(
                command,
                cwd=self.folder / "run",  # Prefect and MLflow read settings from where they are started
                env=inherited | environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for us, who end them in order
                **options,
            )
        self._started[name] = process
        self._note(name).write(process.pid)

    def _wait(self, name: str) -> None:
        deadline = time.monotonic() + STARTUP_SECONDS
        while not self._is_ready(name):
            alive = self.running(name)
            if not alive or time.monotonic() > deadline:
                what = "does not answer" if alive else "ended"
                end = self.log(name).read_text(errors="replace")[-2000:]
                raise ServerTrouble(f"{name} {what}; the end of {self.log(name)}:\n{end}")
            time.sleep(0.1)

    def _is_ready(self, name: str) -> bool:
        if name == "postgres":
            ask = [postgres_program("psql"), "-XAtqc", "select 1", "postgres"]
            done = subprocess.run(ask, env=os.environ | self.admin_environment, capture_output=True, check=False)
            return done.returncode == 0
        page = {"s3": "/", "mlflow": "/health", "prefect": "/api/ready"}[name]
        try:
            with _DIRECT.open(f"{self.address(name)}{page}", timeout=5) as answer:
                return answer.status == 200
        except urllib.error.HTTPError:
            return name == "s3"  # which refuses whatever is not signed
        except OSError:
            return False

    def _process(self, name: str) -> psutil.Process | None:
        """Return the living process of a server, ours or one that an earlier start left behind."""
        if name not in NAMES:
            raise ServerTrouble(f"{name!r}: no such server; expected {', '.join(NAMES)}")
        self._reap()
        return self._note(name).living()

    def _note(self, name: str) -> Note:
        return Note(self.folder / "run" / f"{name}.pid")

    def _end(self, name: str, process: psutil.Process, everything: list[psutil.Process]) -> None:
        kill_all(everything)
        self._note(name).forget(process)
        self._reap()

    def _reap(self) -> None:
        """Take our children that have ended from the process list, where they pass for living, also to PostgreSQL."""
        self._started = {name: child for name, child in self._started.items() if child.poll() is None}


def _aws(key: str, secret: str) -> dict[str, str]:
    return {
        "AWS_ACCESS_KEY_ID": key,
        "AWS_SECRET_ACCESS_KEY": secret,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
