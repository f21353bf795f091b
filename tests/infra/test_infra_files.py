"""Compose file, images, manifests and job templates: valid by their schemas, pinned, and without a secret."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from packaging.requirements import Requirement
from prefect.utilities.templating import apply_values

ROOT = Path(__file__).parents[2]
INFRA = ROOT / "infra"
KUBERNETES = "1.30"
SCHEMATA = resources.files("check_jsonschema") / "builtin_schemas" / "vendor"


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    return yaml.safe_load((INFRA / "compose.yaml").read_text())


def manifests() -> list[dict[str, Any]]:
    files = [path for path in sorted((INFRA / "kubernetes").glob("*.yaml")) if path.name != "kustomization.yaml"]
    return [document for path in files for document in yaml.safe_load_all(path.read_text())]


def filled_template(pool: str) -> dict[str, Any]:
    """A pool's job template with the images that deploy.sh fills in."""
    text = (INFRA / "kubernetes" / f"{pool}-job.json").read_text()
    return json.loads(re.sub(r"\$\{(BIVLM_\w+)\}", r"registry.example.org/\1:0.1.0", text))


def job_of(pool: str, **values: Any) -> dict[str, Any]:
    """The job that a pool's template makes of these values and its defaults, filled in as Prefect does."""
    template = filled_template(pool)
    defaults = {key: each["default"] for key, each in template["variables"]["properties"].items() if "default" in each}
    given = {"name": "run", "command": ["prefect", "flow-run", "execute"], "labels": {"a": "b"}} | values
    job = apply_values(template["job_configuration"]["job_manifest"], defaults | given)
    # Prefect insists on these two in the pod, where Kubernetes does not know them and leaves them out.
    assert [job["spec"]["template"]["spec"].pop(name) for name in ("completions", "parallelism")] == [1, 1]
    return job


def test_the_compose_file_follows_the_specification(compose):
    schema = json.loads((SCHEMATA / "compose-spec.json").read_text())
    jsonschema.validate(compose, schema)
    broken = compose | {"services": compose["services"] | {"s3": {"imaeg": "x"}}}
    with pytest.raises(jsonschema.ValidationError, match="imaeg"):
        jsonschema.validate(broken, schema)


def test_every_service_that_stays_is_healthy_or_not_and_is_started_again(compose):
    for name, service in compose["services"].items():
        if name != "admin":
            assert service["healthcheck"]["test"][0] == "CMD", name
            assert service["restart"] == "unless-stopped", name
    kept = {volume.split(":")[0] for name in ("postgres", "s3") for volume in compose["services"][name]["volumes"]}
    assert {"postgres", "s3"} <= kept <= {*compose["volumes"], "./postgres/databases.sh"}


def test_secrets_are_files_and_have_no_default(compose):
    used = {
        secret if isinstance(secret, str) else secret["source"]
        for service in compose["services"].values()
        for secret in service.get("secrets", [])
    }
    assert used == set(compose["secrets"])
    text = (INFRA / "compose.yaml").read_text()
    for service in compose["services"].values():
        for variable in service.get("environment", {}):
            if re.search("PASSWORD|SECRET|AUTH_STRING|AUTH_KEY", variable):
                assert variable == "POSTGRES_PASSWORD_FILE"
    assert not re.search(r"://[^/\s]*:[^/\s]*@", text)


def variables_of(service: dict[str, Any], **given: str) -> dict[str, str]:
    """The variables of a service, with those that compose puts in where they are `given`."""
    return {
        name: re.sub(r"\$\{(\w+):-([^}]*)\}", lambda match: given.get(match[1]) or match[2], value)
        for name, value in service["environment"].items()
    }


@pytest.mark.parametrize(
    ("given", "served"), [({}, []), ({"MLFLOW_PUBLIC_HOST": "mlflow.example.org"}, ["https://mlflow.example.org"])]
)
def test_mlflow_takes_from_its_pages_what_they_send_also_behind_a_proxy(compose, monkeypatch, given, served):
    from mlflow.server.security_utils import get_allowed_origins_from_env, should_block_cors_request

    for name, value in variables_of(compose["services"]["mlflow"], **given).items():
        monkeypatch.setenv(name, value)
    asked = ["http://localhost:5000", "http://127.0.0.1:5000", "https://mlflow.example.org", "https://evil.example.org"]
    allowed = [
        origin for origin in asked if not should_block_cors_request(origin, "POST", get_allowed_origins_from_env())
    ]
    assert allowed == ["http://localhost:5000", "http://127.0.0.1:5000", *served]


def test_prefect_serves_its_pages_from_a_folder_that_it_may_write_to(compose, monkeypatch):
    from prefect.settings import Settings

    service = compose["services"]["prefect"]
    for name, value in variables_of(service).items():
        monkeypatch.setenv(name, value)
    (volume,) = service["volumes"]
    folder = Path(volume.partition(":")[2])
    assert f"mkdir {folder} && chown bivlm:bivlm {folder}" in (INFRA / "images" / "servers.Dockerfile").read_text()
    assert Path(Settings().server.ui.static_directory).is_relative_to(folder)


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_every_secret_of_the_compose_file_is_made_in_a_folder_of_its_owner_alone(compose, tmp_path, umask):
    """Containers read the files as other users, whatever the umask."""
    from infra.secret_files import write_secrets

    before = os.umask(umask)
    try:
        check_secrets(compose, tmp_path / "secrets", write_secrets)
    finally:
        os.umask(before)


def check_secrets(compose: dict[str, Any], folder: Path, write_secrets: Callable[..., list[str]]) -> None:
    assert set(write_secrets(folder)) == set(compose["secrets"])
    assert folder.stat().st_mode & 0o077 == 0
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o644}
    first = {path.name: path.read_text() for path in folder.iterdir()}
    assert len(set(first.values())) == len(first) and min(map(len, first.values())) >= 20
    assert write_secrets(folder) == []
    write_secrets(folder, renew=True)
    assert not {path.read_text() for path in folder.iterdir()} & set(first.values())


def test_secrets_become_variables_of_what_a_container_runs(tmp_path):
    (tmp_path / "NAME").write_text("it's a secret $HOME\n")
    (tmp_path / "folder").mkdir()
    command = ["sh", str(INFRA / "images" / "with-secrets.sh"), "sh", "-c", 'printf %s "$NAME"']
    done = subprocess.run(command, env={"SECRETS_FOLDER": str(tmp_path)}, capture_output=True, text=True, check=True)
    assert done.stdout == "it's a secret $HOME"


@pytest.mark.parametrize("name", ["servers", "worker"])
def test_images_install_what_is_pinned_as_another_user_than_root(name):
    lines = (INFRA / "images" / f"{name}.Dockerfile").read_text().replace("\\\n", " ").splitlines()
    installs = [line for line in lines if "pip install" in line]
    assert installs and all("-c constraints.txt" in line for line in installs)
    assert [line for line in lines if line.startswith("USER ")] == ["USER bivlm"]
    for line in lines:
        if line.startswith("COPY "):
            for source in line.split()[1:-1]:
                assert (ROOT / source).exists(), line


def test_what_the_images_install_is_bound_to_one_version():
    constraints = [Requirement(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if line[0] != "#"]
    pinned = {each.name for each in constraints}
    line = next(each for each in (INFRA / "images" / "servers.Dockerfile").read_text().splitlines() if "mlflow" in each
                and each.startswith("RUN pip"))  # fmt: skip
    assert set(line.split("constraints.txt ")[1].split()) - pinned <= {"boto3", "psutil"}


@pytest.mark.parametrize("manifest", manifests(), ids=lambda each: f"{each['kind']} {each['metadata']['name']}")
def test_manifests_follow_the_schema_of_kubernetes(manifest):
    kubernetes_validate.validate(manifest, KUBERNETES, strict=True)


def test_a_manifest_with_a_mistake_does_not():
    manifest = next(each for each in manifests() if each["kind"] == "Deployment")
    manifest["spec"]["template"]["spec"]["containers"][0]["imagee"] = "x"
    with pytest.raises(kubernetes_validate.ValidationError, match="imagee"):
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)


def test_manifests_name_only_what_there_is():
    found = {(each["kind"], each["metadata"]["name"]) for each in manifests()}
    text = "".join(path.read_text() for path in (INFRA / "kubernetes").iterdir())
    for name in re.findall(r'claimName"?: "?([\w-]+)', text):
        assert ("PersistentVolumeClaim", name) in found
    for name in re.findall(r'serviceAccountName"?: "?([\w-]+)', text):
        assert ("ServiceAccount", name) in found
    listed = yaml.safe_load((INFRA / "kubernetes" / "kustomization.yaml").read_text())["resources"]
    assert {*listed, "kustomization.yaml"} == {path.name for path in (INFRA / "kubernetes").glob("*.yaml")}
    assert not any(kind == "Secret" for kind, _ in found)


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
def test_kustomize_puts_them_together():
    command = ["kubectl", "kustomize", str(INFRA / "kubernetes")]
    made = list(yaml.safe_load_all(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    assert len(made) == len(manifests())
    for manifest in made:
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
    (settings,) = [manifest["data"] for manifest in made if manifest["kind"] == "ConfigMap"]
    pods = [manifest["spec"]["template"]["spec"] for manifest in made if manifest["kind"] in ("Deployment", "Job")]
    assert [container["image"] for pod in pods for container in pod["containers"]] == [settings["BIVLM_IMAGE"]] * 3


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
def test_the_command_that_makes_the_secret_takes_the_files_that_are_made(tmp_path):
    from infra.secret_files import write_secrets

    write_secrets(tmp_path / "infra" / "secrets")
    text = (INFRA / "kubernetes" / "kustomization.yaml").read_text().replace("\\\n#", "")
    (line,) = re.findall(r"kubectl .*create secret.*", text)
    command = [*shlex.split(line), "--dry-run=client", "--output=yaml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    named = "PREFECT_API_AUTH_STRING MLFLOW_TRACKING_PASSWORD AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY"
    assert set(yaml.safe_load(done.stdout)["data"]) == set(named.split())


@pytest.mark.parametrize(("pool", "limits"), [("gpu", {"memory", "nvidia.com/gpu"}), ("cpu", {"memory"})])
def test_the_job_of_a_run_follows_the_schema_and_holds_references_to_secrets_only(pool, limits):
    job = job_of(pool)
    kubernetes_validate.validate(job, KUBERNETES, strict=True)
    container = job["spec"]["template"]["spec"]["containers"][0]
    assert set(container["resources"]["limits"]) == limits
    assert {"secretRef": {"name": "bivlm"}} in container["envFrom"]
    (threads,) = container["env"]  # a worker adds its own
    assert threads == {"name": "OMP_NUM_THREADS", "valueFrom": {"resourceFieldRef": {"resource": "requests.cpu"}}}
    assert "{{" not in json.dumps(job)


def test_a_deployment_may_ask_for_more_than_its_pool_gives():
    container = job_of("gpu", memory="256Gi", gpus=2)["spec"]["template"]["spec"]["containers"][0]
    assert container["resources"]["limits"] == {"memory": "256Gi", "nvidia.com/gpu": 2}


@pytest.fixture
def deploy(tmp_path) -> Callable[..., list[str]]:
    """deploy.sh with a stand-in for Python: the commands it gives, and copies of the job templates as POOL.json."""
    stand_in = tmp_path / "python"
    stand_in.write_text(
        f"""#!/bin/sh
        echo "$*" >>{tmp_path}/commands
        case "$*" in
            *"work-pool inspect $THERE") exit 0;;
            *"work-pool inspect"*) exit 1;;
            *"work-pool update"*|*"work-pool create"*)
                pool=$6
                while [ $# -gt 1 ]; do [ "$1" = --base-job-template ] && cp "$2" {tmp_path}/"$pool".json; shift; done
        esac
        exit 0
        """
    )
    stand_in.chmod(0o755)

    def run(**variables: str) -> list[str]:
        environment = {"PATH": os.environ["PATH"], "PYTHON": str(stand_in), "THERE": "none"} | variables
        subprocess.run([INFRA / "deploy.sh"], env=environment, check=True, capture_output=True)
        lines = (tmp_path / "commands").read_text().splitlines()
        return [re.sub(" --base-job-template .*", " TEMPLATE", line.removeprefix("-m ")) for line in lines]

    return run


ALWAYS = ["prefect --no-prompt deploy --all", "infra.automations"]


def test_deploy_makes_the_pools_that_are_missing_and_leaves_others_alone(deploy):
    made = [line for line in deploy(THERE="gpu") if "inspect" not in line]
    assert made == ["prefect --no-prompt work-pool create cpu --type process", *ALWAYS]


def test_deploy_renews_the_template_of_a_pool_on_kubernetes_and_nothing_else_of_it(deploy, tmp_path):
    images = {"BIVLM_IMAGE": "here/worker:1", "BIVLM_GPU_IMAGE": "here/gpu:1"}
    done = [line for line in deploy(THERE="gpu", POOL_TYPE="kubernetes", **images) if "inspect" not in line]
    assert done == [
        "prefect --no-prompt work-pool update gpu TEMPLATE",
        "prefect --no-prompt work-pool create cpu --type kubernetes TEMPLATE",
        *ALWAYS,
    ]
    for pool, image in (("cpu", "here/worker:1"), ("gpu", "here/gpu:1")):
        template = json.loads((tmp_path / f"{pool}.json").read_text())
        assert template["variables"]["properties"]["image"]["default"] == image
        assert "${" not in json.dumps(template)


def test_deploy_asks_for_the_images_of_pools_on_kubernetes(deploy):
    with pytest.raises(subprocess.CalledProcessError) as refused:
        deploy(POOL_TYPE="kubernetes", BIVLM_IMAGE="here/worker:1")
    assert b"BIVLM_GPU_IMAGE" in refused.value.stderr
