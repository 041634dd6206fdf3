"""The deployment files against their published schemas, and against rules of safety that no schema has."""

import base64
import copy
import functools
import json
import lzma
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.session import AUTOSCALED

jsonschema = pytest.importorskip("jsonschema")
kubernetes_validate = pytest.importorskip("kubernetes_validate")

ROOT = Path(__file__).parents[2]
KUBERNETES = ROOT / "cluster" / "kubernetes"
AWS = ROOT / "cluster" / "aws.yaml"
VERSION = "1.33"
IMAGE = re.compile(r"^[a-z0-9./-]+:(?!latest$)[A-Za-z0-9][A-Za-z0-9_.-]*$")
# ports that pods offer, and what asks for a name and a password or a token before it answers there
GUARDED = {5432: "scram-sha-256", 5000: "basic-auth", 6379: "token", 8265: "token", 10001: "token"}


def documents() -> list[Any]:
    return [
        pytest.param(document, id=f"{path.name}:{document['kind']}:{document['metadata']['name']}")
        for path in sorted(KUBERNETES.glob("*.yaml"))
        for document in yaml.safe_load_all(path.read_text())
    ]


def pods(document: dict) -> Iterator[dict]:
    """Every pod's spec in a document."""
    spec = document.get("spec", {})
    if document["kind"] in ("Deployment", "StatefulSet"):
        yield spec["template"]["spec"]
    if document["kind"] in ("RayCluster", "RayJob"):
        cluster = spec if document["kind"] == "RayCluster" else spec["rayClusterSpec"]
        for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
            yield group["template"]["spec"]
    if document["kind"] == "RayJob":  # KubeRay's own has no security context, and is refused in this namespace
        yield spec["submitterPodTemplate"]["spec"]


def strict(schema: Any) -> Any:
    """A structural schema that refuses what the server would silently drop: fields that it does not know."""
    if isinstance(schema, list):
        return [strict(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    found = {name: strict(value) for name, value in schema.items()}
    closed = "properties" in found and isinstance(found["properties"], dict) and found.get("type") == "object"
    if closed and not found.get("x-kubernetes-preserve-unknown-fields") and "additionalProperties" not in found:
        found["additionalProperties"] = False
    return found


@functools.cache
def schema_of(kind: str) -> dict:
    packed = Path(__file__).parent / "kuberay" / f"ray.io_{kind.lower()}s.yaml.xz"
    definition = yaml.load(lzma.decompress(packed.read_bytes()), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    version = next(version for version in definition["spec"]["versions"] if version["name"] == "v1")
    schema = strict(version["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}  # the server's own
    return schema


def check(document: dict) -> None:
    """Raises where a document does not fit its schema."""
    if document["apiVersion"].startswith("ray.io/"):
        jsonschema.Draft202012Validator(schema_of(document["kind"])).validate(document)
    else:
        kubernetes_validate.validate(document, VERSION, strict=True)


@pytest.mark.parametrize("document", documents())
def test_a_document_fits_its_published_schema(document: dict) -> None:
    check(document)


@pytest.mark.parametrize("document", documents())
def test_a_document_with_a_wrong_name_does_not(document: dict) -> None:
    wrong = copy.deepcopy(document)
    wrong.setdefault("spec", {})["no-such-field"] = 1
    if document["kind"] == "ServiceAccount":
        wrong["no-such-field"] = 1
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
        check(wrong)
    for spec in pods(wrong):
        del wrong["spec"]["no-such-field"]
        check(wrong)
        spec["containers"][0]["no-such-field"] = 1  # deep inside too
        with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
            check(wrong)
        break


@pytest.mark.parametrize("document", documents())
def test_no_pod_has_rights_that_it_does_not_need(document: dict) -> None:
    for spec in pods(document):
        assert spec["securityContext"]["runAsNonRoot"] and spec["securityContext"]["runAsUser"] > 0
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not any(spec.get(name) for name in ("hostNetwork", "hostPID", "hostIPC"))
        assert all("hostPath" not in volume for volume in spec.get("volumes", []))
        for container in spec["containers"]:
            context = container["securityContext"]
            assert context["readOnlyRootFilesystem"] and not context["allowPrivilegeEscalation"]
            assert context["capabilities"] == {"drop": ["ALL"]} and not context.get("privileged")
            for kind in ("requests", "limits"):
                assert {"cpu", "memory"} <= container["resources"][kind].keys()
            assert IMAGE.match(container["image"]), f"{container['image']} has no fixed tag"
            assert all("hostPort" not in port for port in container.get("ports", []))
            for port in container.get("ports", []):
                assert port["containerPort"] in GUARDED
    if document["kind"] == "Service":
        assert document["spec"].get("type", "ClusterIP") == "ClusterIP"
        assert {port["port"] for port in document["spec"]["ports"]} <= GUARDED.keys()


def test_what_guards_the_ports_is_there() -> None:
    text = (KUBERNETES / "mlflow.yaml").read_text()
    assert "{name: POSTGRES_HOST_AUTH_METHOD, value: scram-sha-256}" in text
    assert "--app-name basic-auth" in (ROOT / "cluster" / "mlflow-server.sh").read_text()
    for name in ("ray-cluster", "ray-job"):
        document = yaml.safe_load((KUBERNETES / f"{name}.yaml").read_text())
        cluster = document["spec"].get("rayClusterSpec", document["spec"])
        assert cluster["authOptions"] == {"mode": "token"}
        assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    policies = [value.values[0] for value in documents() if value.values[0]["kind"] == "NetworkPolicy"]
    assert any(policy["spec"]["podSelector"] == {} and "ingress" not in policy["spec"] for policy in policies)
    commands = yaml.safe_load(AWS.read_text())
    for command in (*commands["head_start_ray_commands"][1:], *commands["worker_start_ray_commands"][1:]):
        assert re.match(r"RAY_AUTH_MODE=token ([A-Z_]+=('[^']*'|\d+) )*ray start ", command)
    assert "--dashboard-host=127.0.0.1" in commands["head_start_ray_commands"][1]


def test_the_job_has_the_cluster_of_the_cluster() -> None:
    cluster, job = (yaml.safe_load((KUBERNETES / f"ray-{name}.yaml").read_text()) for name in ("cluster", "job"))
    assert job["spec"]["rayClusterSpec"] == cluster["spec"]
    gpu = next(group for group in cluster["spec"]["workerGroupSpecs"] if group["groupName"] == "gpu")
    limits = gpu["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert limits["nvidia.com/gpu"] == "1"
    assert all(group["template"]["spec"]["tolerations"] for group in cluster["spec"]["workerGroupSpecs"])


def test_what_the_autoscaler_may_start_is_what_programs_are_told() -> None:
    """Programs refuse at once what no node that may come has room for."""
    spec = yaml.safe_load((KUBERNETES / "ray-cluster.yaml").read_text())["spec"]
    env = spec["headGroupSpec"]["template"]["spec"]["containers"][0]["env"]
    (told,) = (json.loads(one["value"]) for one in env if one["name"] == AUTOSCALED)
    for one, group in zip(told, spec["workerGroupSpecs"], strict=True):
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        assert one["count"] == group["maxReplicas"] and one["cpus"] == int(limits["cpu"])
        assert one.get("gpus", 0) == int(limits.get("nvidia.com/gpu", 0))
        assert group["labels"] == {"pool": group["groupName"]}
    config = yaml.safe_load(AWS.read_text())
    commands = [config[f"{kind}_start_ray_commands"][1] for kind in ("head", "worker")]
    told, again = (json.loads(re.search(f"{AUTOSCALED}='(.*?)'", one).group(1)) for one in commands)  # type: ignore[union-attr]
    assert told == again
    nodes = [node for name, node in config["available_node_types"].items() if name != "head"]
    for one, node in zip(told, nodes, strict=True):
        assert one["count"] == node["max_workers"] and one["cpus"] == node["resources"]["CPU"]
        assert one.get("gpus", 0) == node["resources"].get("GPU", 0)


GIB = 2**30


def test_stores_have_room_in_shared_memory() -> None:
    """Ray takes 30 % of a machine's memory for objects, and a disk where /dev/shm is smaller."""
    spec = yaml.safe_load((KUBERNETES / "ray-cluster.yaml").read_text())["spec"]
    for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]:
        pod = group["template"]["spec"]
        memory = int(pod["containers"][0]["resources"]["limits"]["memory"].removesuffix("Gi"))
        (shm,) = (volume["emptyDir"]["sizeLimit"] for volume in pod["volumes"] if volume["name"] == "shm")
        assert int(shm.removesuffix("Gi")) >= 0.3 * memory, group.get("groupName", "head")
    config = yaml.safe_load(AWS.read_text())
    (size,) = re.findall(r"--shm-size (\d+)g", " ".join(config["docker"]["run_options"]))
    for kind in ("head", "worker"):
        (store,) = re.findall(r"--object-store-memory=(\d+)", config[f"{kind}_start_ray_commands"][1])
        assert int(store) <= int(size) * GIB


def test_a_stopped_job_has_time_for_a_checkpoint() -> None:
    """Ray's default is 3 seconds before it kills. The head runs jobs."""
    spec = yaml.safe_load((KUBERNETES / "ray-cluster.yaml").read_text())["spec"]
    env = spec["headGroupSpec"]["template"]["spec"]["containers"][0]["env"]
    (seconds,) = (one["value"] for one in env if one["name"] == "RAY_JOB_STOP_WAIT_TIME_S")
    start = yaml.safe_load(AWS.read_text())["head_start_ray_commands"][1]
    assert int(seconds) >= 60 and f"RAY_JOB_STOP_WAIT_TIME_S={seconds} " in start


def test_the_image_has_what_ray_up_calls() -> None:
    """The autoscaler runs in the head's container, and reaches other machines by ssh and rsync."""
    text = (ROOT / "cluster" / "Dockerfile").read_text()
    (packages,) = re.findall(r"^RUN apt-get update && apt-get install -y --no-install-recommends (.*?) *\\?$", text,
                             re.MULTILINE)[:1]  # fmt: skip
    assert {"openssh-client", "rsync", "procps", "wget"} <= set(packages.split())


def test_ray_up_reads_its_file() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load(AWS.read_text())
    validate_config(prepare_config(copy.deepcopy(config)))
    with pytest.raises(jsonschema.ValidationError):
        validate_config(prepare_config({**copy.deepcopy(config), "no_such_field": 1}))
    for name, node in config["available_node_types"].items():
        assert node["node_config"]["MetadataOptions"]["HttpTokens"] == "required", name
        assert node["node_config"]["BlockDeviceMappings"][0]["Ebs"]["Encrypted"], name
    assert IMAGE.match(config["docker"]["image"])


@pytest.mark.parametrize(
    "path", sorted(path for path in (ROOT / "cluster").rglob("*") if path.is_file() and path.suffix != ".pyc"),
    ids=lambda path: path.name,
)  # fmt: skip
def test_no_secret_and_no_floating_tag_in_any_file(path: Path) -> None:
    text = path.read_text()
    assert not re.search(r"\bAKIA[0-9A-Z]{16}\b|-----BEGIN|\bghp_\w{20}", text)
    assert not re.search(r":latest\b", text)
    if path.suffix == ".yaml":
        for document in yaml.safe_load_all(text):
            assert document.get("kind") != "Secret"
            for name, value in leaves(document):
                if re.search(r"password|secret|token|access.?key", name, re.IGNORECASE):
                    assert not looks_like_one(value), f"{path.name}: {name} may be a secret"
    if path.name == "Dockerfile":
        images = re.findall(r"^FROM (\S+)", text, re.MULTILINE)
        stages = set(re.findall(r" AS (\S+)", text))
        assert images and all(image in stages or IMAGE.match(image) for image in images)
        assert not re.search(r"^(ENV|ARG) .*(PASSWORD|SECRET|TOKEN|KEY)", text, re.MULTILINE)


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """(name, text) of all texts; of {name: x, value: y} it is (x, y)."""
    if isinstance(value, dict):
        if isinstance(value.get("name"), str) and isinstance(value.get("value"), str):
            yield value["name"], value["value"]
        for key, inner in value.items():
            yield from leaves(inner, str(key))
    elif isinstance(value, list):
        for inner in value:
            yield from leaves(inner, name)
    elif isinstance(value, str):
        yield name, value


def looks_like_one(value: str) -> bool:
    return len(value) >= 16 and re.fullmatch(r"[A-Za-z0-9+/=_-]+", value) is not None and not value.startswith("~")


def test_a_secret_would_be_found() -> None:
    assert looks_like_one(base64.b64encode(b"a" * 24).decode()) and not looks_like_one("vqvae-mlflow")
    assert next(leaves({"env": [{"name": "PASSWORD", "value": "x"}]})) == ("PASSWORD", "x")
