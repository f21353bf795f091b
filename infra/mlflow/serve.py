"""MLflow's tracking server behind passwords, on PostgreSQL and S3. All settings come from the environment:

PGHOST, PGPORT, PGUSER, PGPASSWORD of its databases; ``MLFLOW_ADMIN_PASSWORD``; name and password of the one account of
workers and people in ``MLFLOW_TRACKING_USERNAME`` and ``MLFLOW_TRACKING_PASSWORD``; ``MLFLOW_FLASK_SERVER_SECRET_KEY``;
``MLFLOW_ARTIFACTS_DESTINATION``; ``AWS_*``. Arguments go to ``mlflow server``.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

ADMIN = "admin"


def bring_users_up_to_date() -> None:
    """Make the two accounts, or give them the passwords that the environment says.

    Through MLflow's own store and not its API, which requires the password that is to be replaced: so a rotation that
    was interrupted, or a database restored from another time, is put right by starting again.
    """
    from mlflow.server.auth.config import read_auth_config
    from mlflow.server.auth.sqlalchemy_store import SqlAlchemyStore

    store = SqlAlchemyStore()
    store.init_db(read_auth_config().database_uri)
    worker, password = os.environ["MLFLOW_TRACKING_USERNAME"], os.environ["MLFLOW_TRACKING_PASSWORD"]
    for name, secret, rules in ((ADMIN, os.environ["MLFLOW_ADMIN_PASSWORD"], True), (worker, password, False)):
        if not store.has_user(name):
            store.create_user(name, secret, is_admin=rules)
        elif not store.authenticate_user(name, secret):
            store.update_user(name, password=secret)


def main(arguments: list[str]) -> None:
    os.environ["MLFLOW_AUTH_CONFIG_PATH"] = str(Path(__file__).with_name("auth.ini"))
    bring_users_up_to_date()
    # A server must not pass for its own client; what is left in its environment is seen by all that it starts.
    for name in ("MLFLOW_ADMIN_PASSWORD", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        del os.environ[name]
    command = [sys.executable, "-m", "mlflow", "server", "--app-name", "basic-auth", *arguments]
    os.execv(sys.executable, command)


if __name__ == "__main__":
    main(sys.argv[1:])
