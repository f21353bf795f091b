"""Compose file, images, manifests and job templates: valid by their schemas, pinned, and without a secret."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
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


def job_of(pool: str, **values: Any) -> dict[str, Any]:
    """The job that a pool's template makes of these values and its defaults, filled in as Prefect does."""
    template = json.loads((INFRA / "kubernetes" / f"{pool}-job.json").read_text())
    defaults = {key: each["default"] for key, each in template["variables"]["properties"].items() if "default" in each}
    given = {"name": "run", "command": ["prefect", "flow-run", "execute"], "labels": {"a": "b"}} | values
    given.setdefault("env", [{"name": "PREFECT__FLOW_RUN_ID", "value": "1"}])
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


def test_every_secret_of_the_compose_file_is_made_and_belongs_to_its_owner_alone(compose, tmp_path):
    from infra.secret_files import write_secrets

    folder = tmp_path / "secrets"
    assert set(write_secrets(folder)) == set(compose["secrets"])
    assert folder.stat().st_mode & 0o077 == 0
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


@pytest.mark.parametrize(("pool", "limits"), [("gpu", {"memory", "nvidia.com/gpu"}), ("cpu", {"memory"})])
def test_the_job_of_a_run_follows_the_schema_and_holds_references_to_secrets_only(pool, limits):
    job = job_of(pool)
    kubernetes_validate.validate(job, KUBERNETES, strict=True)
    container = job["spec"]["template"]["spec"]["containers"][0]
    assert set(container["resources"]["limits"]) == limits
    assert {"secretRef": {"name": "bivlm"}} in container["envFrom"]
    assert container["env"] == [{"name": "PREFECT__FLOW_RUN_ID", "value": "1"}]
    assert "{{" not in json.dumps(job)


def test_a_deployment_may_ask_for_more_than_its_pool_gives():
    container = job_of("gpu", memory="256Gi", gpus=2)["spec"]["template"]["spec"]["containers"][0]
    assert container["resources"]["limits"] == {"memory": "256Gi", "nvidia.com/gpu": 2}
