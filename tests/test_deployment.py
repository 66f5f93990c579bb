"""cluster.yaml and its variants are what Ray and KubeRay take."""

from pathlib import Path

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parent.parent
CRDS = ROOT.parent / "shared" / "kuberay"
LAUNCHED = ["cluster.yaml", "configs/deployment/on_premise.yaml"]


def load(name):
    return yaml.safe_load((ROOT / name).read_text())


@pytest.mark.parametrize("name", LAUNCHED)
def test_the_launcher_takes_it(name):
    validate_config(prepare_config(load(name)))


@pytest.mark.parametrize("name", LAUNCHED)
def test_the_launcher_would_refuse_a_misspelt_key(name):
    with pytest.raises(Exception, match="idle_timeout_minute"):
        validate_config(prepare_config(load(name) | {"idle_timeout_minute": 5}))


@pytest.mark.parametrize("name", LAUNCHED)
def test_nodes_get_the_package_and_what_it_is_installed_with_and_no_results(name):
    mounts = load(name)["file_mounts"].values()
    own = {mount.removeprefix("./") for mount in mounts if not mount.startswith("~")}
    assert own == {
        *("cp2image", "jobs", "configs"),
        *("pyproject.toml", "constraints.txt", "README.md", "LICENSE"),
    }
    assert all((ROOT / mount).exists() for mount in own)


@pytest.mark.parametrize("name", LAUNCHED)
def test_every_node_asks_for_the_token_and_notices_a_lost_one_soon(name):
    cluster = load(name)
    for commands in (cluster["head_start_ray_commands"], cluster["worker_start_ray_commands"]):
        (start,) = [command for command in commands if "ray start" in command]
        assert "RAY_AUTH_MODE=token" in start
        assert "RAY_health_check_failure_threshold=3" in start
        assert "RAY_grpc_client_keepalive_time_ms=5000" in start
    assert any("constraints.txt" in command for command in cluster["setup_commands"])


def strict(schema):
    """The CRD's schema with unknown keys refused, as the operator's API server does."""
    if isinstance(schema, list):
        return [strict(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: strict(value) for key, value in schema.items()}
    if found.pop("x-kubernetes-int-or-string", False):
        return {"type": ["integer", "string"]}
    free = found.get("x-kubernetes-preserve-unknown-fields")
    if "properties" in found and "additionalProperties" not in found and not free:
        found["additionalProperties"] = False
    return found


@pytest.fixture(scope="module")
def rayjob():
    path = CRDS / "rayjobs.yaml"
    if not path.exists():
        pytest.skip(f"the KubeRay CRD is not at {path}")
    versions = yaml.safe_load(path.read_text())["spec"]["versions"]
    (schema,) = [one["schema"]["openAPIV3Schema"] for one in versions if one["name"] == "v1"]
    found = strict(schema)
    found["properties"]["metadata"] = {"type": "object"}
    return jsonschema.Draft7Validator(found)


def test_the_rayjob_fits_its_crd(rayjob):
    errors = [
        error.message for error in rayjob.iter_errors(load("configs/deployment/kuberay.yaml"))
    ]
    assert not errors


def test_the_crd_would_refuse_a_misspelt_key(rayjob):
    job = load("configs/deployment/kuberay.yaml")
    job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["maxReplica"] = 3
    assert list(rayjob.iter_errors(job))


def test_the_rayjob_pins_rays_version_and_holds_no_secret():
    text = (ROOT / "configs/deployment/kuberay.yaml").read_text()
    pinned = [
        line.partition("==")[2]
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line.startswith("ray==")
    ]
    job = yaml.safe_load(text)
    assert job["spec"]["rayClusterSpec"]["rayVersion"] == pinned[0]
    for container in containers(job):
        for variable in container["env"]:
            if any(word in variable["name"] for word in ("TOKEN", "KEY", "SECRET", "PASSWORD")):
                assert "secretKeyRef" in variable["valueFrom"]


def containers(job):
    cluster = job["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        yield from group["template"]["spec"]["containers"]
