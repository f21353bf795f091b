"""The pictures of MLflow's and Prefect's pages in these documents, taken from running servers by headless Chromium.

``python docs/screenshots.py --mlflow http://127.0.0.1:5000 --model NAME/VERSION [--prefect URL --flow-run ID]`` writes
mlflow-*.png and prefect-run.png into this folder. Users and passwords are read from MLflow's and Prefect's own
variables; the browser, which knows none, sees both servers through a forwarder that adds them.
"""

from __future__ import annotations

import argparse
import base64
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
from mlflow import MlflowClient
from PIL import Image

HERE = Path(__file__).parent
WIDTH, PANEL = 1500, 382  # pixels; MLflow's assistant takes so many on the right, and cannot be closed from outside


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--mlflow", required=True, metavar="URL", help="a running server")
    parser.add_argument("--model", required=True, metavar="NAME/VERSION", help="a registered version")
    parser.add_argument("--prefect", metavar="URL", help="a running server")
    parser.add_argument("--flow-run", metavar="ID", help="of a compression")
    parser.add_argument("--output", type=Path, default=HERE, metavar="DIR")
    options = parser.parse_args()
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        print("screenshots: no Chromium on the path; on Debian it is the package chromium", file=sys.stderr)
        return 1
    options.output.mkdir(parents=True, exist_ok=True)
    name, _, number = options.model.partition("/")
    version = MlflowClient(options.mlflow).get_model_version(name, number)
    experiment = f"/#/experiments/{version.tags['bivlm.experiment']}"
    pages = {
        "registry": (f"/#/models/{name}", 900),
        "version": (f"/#/models/{name}/versions/{number}", 1050),
        "model": (f"{experiment}/models/{version.tags['bivlm.model_id']}", 1050),
        "base": (f"{experiment}/models/{version.tags['bivlm.base.model_id']}", 800),
        "run": (f"{experiment}/runs/{version.run_id}", 900),
    }
    user = f"{os.environ.get('MLFLOW_TRACKING_USERNAME', '')}:{os.environ.get('MLFLOW_TRACKING_PASSWORD', '')}"
    with forwarded(options.mlflow, user) as address:
        for page, (path, height) in pages.items():
            take(browser, address + path, options.output / f"mlflow-{page}.png", height, PANEL)
    if options.prefect and options.flow_run:
        with forwarded(options.prefect, os.environ.get("PREFECT_API_AUTH_STRING", "")) as address:
            take(browser, f"{address}/runs/flow-run/{options.flow_run}", options.output / "prefect-run.png", 900, 0)
    return 0


@contextmanager
def forwarded(server: str, user: str) -> Iterator[str]:
    """The address of a local server that passes everything on to `server` as `user`, ``NAME:PASSWORD``."""
    authorization = f"Basic {base64.b64encode(user.encode()).decode()}"

    class Forwarder(BaseHTTPRequestHandler):
        def _forward(self) -> None:
            headers = {key: value for key, value in self.headers.items() if key.lower() in ("content-type", "accept")}
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            address = server.rstrip("/") + self.path
            answer = httpx.request(
                self.command, address, content=body, headers=headers | {"Authorization": authorization}, timeout=60
            )
            # Prefect's page asks for the password itself where it is told that there is one.
            content = answer.content.replace(b'"auth":"BASIC"', b'"auth":null').replace(
                server.rstrip("/").encode(), b""
            )
            self.send_response(answer.status_code)
            self.send_header("Content-Type", answer.headers.get("Content-Type", "text/plain"))
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = _forward

        def log_message(self, *_arguments: object) -> None:
            """Nothing: the browser's requests are of no interest."""

    forwarder = ThreadingHTTPServer(("127.0.0.1", 0), Forwarder)
    threading.Thread(target=forwarder.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{forwarder.server_port}"
    finally:
        forwarder.shutdown()
        forwarder.server_close()


def take(browser: str, address: str, file: Path, height: int, cut: int) -> None:
    """A picture of the page, `cut` pixels less on the right; raises CalledProcessError if the browser fails."""
    with tempfile.TemporaryDirectory() as profile:
        taken = Path(profile) / "page.png"
        command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        # Virtual time: the page gets so many milliseconds of its own clock to fetch and draw.
        command += [f"--window-size={WIDTH},{height}", "--virtual-time-budget=20000", f"--user-data-dir={profile}"]
        subprocess.run([*command, f"--screenshot={taken}", address], check=True, capture_output=True, timeout=300)
        with Image.open(taken) as picture:
            kept = picture.crop((0, 0, picture.width - cut, picture.height)).convert("RGB")
            kept.quantize(128).save(file, optimize=True)
    print(file)


if __name__ == "__main__":
    sys.exit(main())
