"""The pictures of MLflow's and Prefect's pages in these documents, taken from running servers by headless Chromium.

``python docs/screenshots.py --mlflow http://127.0.0.1:5000 --model NAME/VERSION [--prefect URL --flow-run ID]`` writes
mlflow-*.png and prefect-run.png into this folder. MLflow's user and password are read from its own variables.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

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
    for page, (path, height) in pages.items():
        take(browser, options.mlflow.rstrip("/") + path, options.output / f"mlflow-{page}.png", height, PANEL)
    if options.prefect and options.flow_run:
        address = f"{options.prefect.rstrip('/')}/runs/flow-run/{options.flow_run}"
        take(browser, address, options.output / "prefect-run.png", 900, 0)
    return 0


def take(browser: str, address: str, file: Path, height: int, cut: int) -> None:
    """A picture of the page, `cut` pixels less on the right; raises CalledProcessError if the browser fails."""
    with tempfile.TemporaryDirectory() as profile:
        taken = Path(profile) / "page.png"
        command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        # Virtual time: the page gets so many milliseconds of its own clock to fetch and draw.
        command += [f"--window-size={WIDTH},{height}", "--virtual-time-budget=60000", f"--user-data-dir={profile}"]
        subprocess.run([*command, f"--screenshot={taken}", address], check=True, capture_output=True, timeout=300)
        with Image.open(taken) as picture:
            kept = picture.crop((0, 0, picture.width - cut, picture.height)).convert("RGB")
            kept.quantize(128).save(file, optimize=True)
    print(file)


if __name__ == "__main__":
    sys.exit(main())
