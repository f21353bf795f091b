"""Write random secrets as files for compose and Kubernetes: `python -m infra.secret_files FOLDER [--renew]`.

The folder is its owner's alone; the files in it can be read by all who are given them, because containers see
them with the permissions that they have here, and run as other users.
"""

from __future__ import annotations

import argparse
import secrets
import sys
from pathlib import Path

from infra.surroundings import write_privately

PLAIN = (
    "POSTGRES_PASSWORD",
    "MLFLOW_DATABASE_PASSWORD",
    "PREFECT_DATABASE_PASSWORD",
    "MLFLOW_ADMIN_PASSWORD",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_FLASK_SERVER_SECRET_KEY",
    "S3_MLFLOW_KEY",
    "S3_MLFLOW_SECRET",
    "S3_WORKER_KEY",
    "S3_WORKER_SECRET",
)


def write_secrets(folder: Path, *, renew: bool = False) -> list[str]:
    """Make the files that are missing, or all of them; returns the names of those that were made."""
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    made = []

    def put(name: str, text: str) -> None:
        write_privately(folder / name, text, 0o644)
        made.append(name)

    for name in PLAIN:
        if renew or not (folder / name).exists():
            put(name, secrets.token_hex(10 if name.endswith("_KEY") and name.startswith("S3_") else 24))
    if renew or not (folder / "PREFECT_API_AUTH_STRING").exists():
        put("PREFECT_API_AUTH_STRING", f"bivlm:{secrets.token_hex(24)}")
    # What the S3 server needs follows from the keys: both pairs, as rclone reads its variable.
    known = {name: (folder / name).read_text() for name in PLAIN if name.startswith("S3_")}
    pairs = ",".join(f'"{known[f"S3_{who}_KEY"]},{known[f"S3_{who}_SECRET"]}"' for who in ("WORKER", "MLFLOW"))
    if not (folder / "RCLONE_AUTH_KEY").exists() or (folder / "RCLONE_AUTH_KEY").read_text() != pairs:
        put("RCLONE_AUTH_KEY", pairs)
    return made


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m infra.secret_files", description="Random secrets as files.")
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--renew", action="store_true", help="replace those that are there")
    options = parser.parse_args(arguments)
    made = write_secrets(options.folder, renew=options.renew)
    print(f"{options.folder}: made {', '.join(made)}" if made else f"{options.folder}: all there")
    return 0


if __name__ == "__main__":
    sys.exit(main())
