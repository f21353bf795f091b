"""What Prefect's own Kubernetes worker, told what its Deployment tells it, makes of our job templates."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from tests.infra.test_infra_files import KUBERNETES, filled_template

pytestmark = pytest.mark.skipif(find_spec("prefect_kubernetes") is None, reason="prefect-kubernetes is not installed")
FOLDER = Path(__file__).parents[2] / "infra" / "kubernetes"

# The worker up to the moment at which it hands the job to the cluster.
MAKE_A_JOB = """
import asyncio, json, sys
from unittest.mock import AsyncMock, MagicMock, patch
from uuid import uuid4
from prefect.client.schemas.objects import FlowRun
from prefect_kubernetes.settings import KubernetesSettings
from prefect_kubernetes.worker import KubernetesWorker, KubernetesWorkerJobConfiguration

async def main(template):
    configuration = await KubernetesWorkerJobConfiguration.from_template_and_values(template, {}, client=AsyncMock())
    configuration.prepare_for_flow_run(FlowRun(id=uuid4(), flow_id=uuid4(), name="brave-otter"))
    with patch("prefect_kubernetes.worker.BatchV1Api") as batch:
        batch.return_value.create_namespaced_job = made = AsyncMock()
        await KubernetesWorker(work_pool_name="gpu")._create_job(configuration, MagicMock())
    namespace, job = made.await_args.args
    watched = sorted(KubernetesSettings().observer.namespaces)
    print(json.dumps({"namespace": namespace, "job": job, "watched": watched}))

asyncio.run(main(json.load(sys.stdin)))
"""


def secret(key: str) -> str:
    return f"canary-of-{key}"


def environment(pool: str) -> dict[str, str]:
    """What the worker's container finds in its environment."""
    deployment = yaml.safe_load((FOLDER / f"worker-{pool}.yaml").read_text())
    settings = yaml.safe_load((FOLDER / "settings.yaml").read_text())["data"]
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    found = {}
    for entry in container["env"]:
        source = entry.get("valueFrom", {})
        if "secretKeyRef" in source:
            found[entry["name"]] = secret(source["secretKeyRef"]["key"])
        elif "configMapKeyRef" in source:
            found[entry["name"]] = settings[source["configMapKeyRef"]["key"]]
        else:
            found[entry["name"]] = entry["value"]
    return found


@pytest.fixture(params=["gpu", "cpu"])
def handed_over(request, tmp_path) -> dict[str, Any]:
    mine = {key: value for key, value in os.environ.items() if not key.startswith("PREFECT_")}
    done = subprocess.run(
        [sys.executable, "-c", MAKE_A_JOB],
        input=json.dumps(filled_template(request.param)),
        env=mine | environment(request.param) | {"PREFECT_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_password_is_a_reference_in_the_job_that_the_worker_makes(handed_over):
    (container,) = handed_over["job"]["spec"]["template"]["spec"]["containers"]
    env = {entry["name"]: entry for entry in container["env"]}
    reference = {"secretKeyRef": {"name": "bivlm", "key": "PREFECT_API_AUTH_STRING"}}
    assert env["PREFECT_API_AUTH_STRING"] == {"name": "PREFECT_API_AUTH_STRING", "valueFrom": reference}
    assert env["PREFECT_API_URL"]["value"] == "https://prefect.example.org/api"  # so its settings were really copied
    assert "canary" not in json.dumps(handed_over)


def test_a_run_computes_with_as_many_threads_as_it_asks_for_cores(handed_over):
    (container,) = handed_over["job"]["spec"]["template"]["spec"]["containers"]
    (threads,) = [entry for entry in container["env"] if entry["name"] == "OMP_NUM_THREADS"]
    assert threads["valueFrom"] == {"resourceFieldRef": {"resource": "requests.cpu"}}
    assert int(container["resources"]["requests"]["cpu"]) >= 1


def test_the_job_that_the_worker_makes_follows_the_schema_and_is_where_it_is_watched(handed_over):
    job = handed_over["job"]
    # Prefect insists on these two in the pod, where Kubernetes does not know them and leaves them out.
    assert [job["spec"]["template"]["spec"].pop(name) for name in ("completions", "parallelism")] == [1, 1]
    kubernetes_validate.validate(job, KUBERNETES, strict=True)
    assert handed_over["watched"] == [handed_over["namespace"]] == ["bivlm"]
