"""Settings decided once for a stack and kept in its folder: every server's port, and the secrets."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from infra.surroundings import ServerTrouble, answers, free_port, write_privately

NAMES = ("postgres", "s3", "mlflow", "prefect")  # in the order in which they start
USUAL_PORTS = {"postgres": 5432, "s3": 9000, "mlflow": 5000, "prefect": 4200}
SECRETS = (
    "mlflow_database",
    "prefect_database",
    "mlflow_admin",
    "mlflow_worker",
    "mlflow_session",
    "prefect_api",
    "s3_mlflow_key",
    "s3_mlflow_secret",
    "s3_worker_key",
    "s3_worker_secret",
)


@dataclass
class Settings:
    """Ports by server and secrets by name."""

    ports: dict[str, int] = field(default_factory=dict)
    secrets: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, file: Path, ports: Mapping[str, int], *, usual: bool) -> Settings:
        """Return what `file` holds, completed with `ports`; missing ones are `usual` where free, else any.

        Raises `ServerTrouble` for a port of no server and for a file that is not ours.
        """
        if unknown := set(ports) - set(NAMES):
            raise ServerTrouble(f"ports for {', '.join(sorted(unknown))}: expected {', '.join(NAMES)}")
        try:
            settings = cls(**json.loads(file.read_text(encoding="utf-8"))) if file.exists() else cls()
        except (ValueError, TypeError) as error:
            raise ServerTrouble(f"{file}: not the settings of a stack: {error}") from error
        before = asdict(settings)
        for name in NAMES:
            if name in ports:
                settings.ports[name] = ports[name]
            elif name not in settings.ports:
                wanted = USUAL_PORTS[name]
                settings.ports[name] = wanted if usual and not answers(wanted) else free_port()
        settings.secrets |= {name: _secret(name) for name in SECRETS if name not in settings.secrets}
        if asdict(settings) != before:
            settings.write(file)
        return settings

    def renew(self) -> None:
        """Replace all secrets by new ones."""
        self.secrets = {name: _secret(name) for name in SECRETS}

    def write(self, file: Path) -> None:
        """Write the settings for their owner's eyes only."""
        write_privately(file, json.dumps(asdict(self), indent=2))


def _secret(name: str) -> str:
    return secrets.token_hex(10 if name.endswith("_key") else 24)
