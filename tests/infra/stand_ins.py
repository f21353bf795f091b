"""Servers whose four processes are `sleep`: notes, signals, the lock and the commands are the real ones.

python -m tests.infra.stand_ins COMMAND --folder FOLDER
"""

from __future__ import annotations

import sys
import time
from typing import Any

from infra.servers import parser
from infra.settings import NAMES
from infra.stack import Servers, Start

SECONDS_WITHOUT_ANY = 1.5  # more than `run` waits between two looks


class StandIns(Servers):
    """Every server is up as soon as its process is there; the first takes its time before it is started."""

    def _postgres(self) -> Start:
        time.sleep(SECONDS_WITHOUT_ANY)
        return self._s3()

    def _s3(self) -> Start:
        return ["sleep", "300"], {}, {}

    _mlflow = _prefect = _s3

    def _is_ready(self, name: str) -> bool:
        return True

    def _make_databases(self) -> None:
        pass


def main(arguments: list[str]) -> Any:
    options = parser().parse_args(arguments)
    return options.command(StandIns(options.folder), options.names or NAMES)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
