"""compose.yaml and the KubeRay manifests: their parts fit together, and with the images.

A small structural check; the files' schemas are the tools' own (`docker compose config`,
`kubectl apply --dry-run=server`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

DOCKER = Path(__file__).parents[2] / "docker"
ROOT = DOCKER.parent
RAY = re.search(r"^ray==(.*)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    return dict(yaml.safe_load((DOCKER / "compose.yaml").read_text()))


@pytest.fixture(scope="module")
def objects() -> list[dict[str, Any]]:
    files = sorted((DOCKER / "kuberay").glob("*.yaml"))
    return [thing for file in files for thing in yaml.safe_load_all(file.read_text())]


def pods(thing: Any) -> Iterator[dict[str, Any]]:
    """Every pod spec inside a document."""
    if isinstance(thing, dict):
        if "containers" in thing:
            yield thing
        for value in thing.values():
            yield from pods(value)
    elif isinstance(thing, list):
        for value in thing:
            yield from pods(value)


def ray_pods(objects: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The pod specs of the Ray cluster: the head's, then each worker group's."""
    return list(pods(one(objects, "RayCluster", "evomerge")))


def one(objects: list[dict[str, Any]], kind: str, name: str) -> dict[str, Any]:
    (found,) = [o for o in objects if o["kind"] == kind and o["metadata"]["name"] == name]
    return found


class TestCompose:
    def test_what_is_built_exists(self, compose: dict[str, Any]) -> None:
        built = [service["build"] for service in compose["services"].values() if "build" in service]
        assert built
        for build in built:
            assert (DOCKER / build["context"]).resolve() == ROOT
            assert (ROOT / build["dockerfile"]).exists()

    def test_starts_in_the_order_of_health(self, compose: dict[str, Any]) -> None:
        services = compose["services"]
        for name, service in services.items():
            for other, how in service.get("depends_on", {}).items():
                if how["condition"] == "service_healthy":
                    own = services[other].get("healthcheck", {})
                    image = services[other]["image"].startswith("evomerge-worker")
                    assert "test" in own or image, f"{name} waits for {other}, which says nothing"
                else:
                    assert how["condition"] == "service_completed_successfully"
                    assert "restart" not in services[other]
        assert set(services["controller"]["depends_on"]) == {"ray-head", "worker"}
        assert "migrate" in services["ray-head"]["depends_on"]

    def test_only_the_controllers_machines_know_the_database(self, compose: dict[str, Any]) -> None:
        knows = {n for n, s in compose["services"].items() if "EVOMERGE_STORE" in s["environment"]}
        assert knows == {"migrate", "ray-head", "controller", "dashboard"}

    def test_all_of_ray_has_the_token(self, compose: dict[str, Any]) -> None:
        for name in ("ray-head", "worker", "controller"):
            environment = compose["services"][name]["environment"]
            assert environment["RAY_AUTH_MODE"] == "token"
            assert environment["RAY_AUTH_TOKEN"].startswith("${RAY_AUTH_TOKEN:?")

    def test_secrets_are_asked_for_and_ports_are_the_hosts_own(
        self, compose: dict[str, Any]
    ) -> None:
        text = (DOCKER / "compose.yaml").read_text()
        named = set(re.findall(r"\$\{(\w+)", text))
        shown = set(re.findall(r"^(\w+)=", (DOCKER / "env.example").read_text(), re.MULTILINE))
        assert shown <= named
        assert re.findall(r"^(\w+)=$", (DOCKER / "env.example").read_text(), re.MULTILINE) == [
            "POSTGRES_PASSWORD",
            "RAY_AUTH_TOKEN",
        ]
        for service in compose["services"].values():
            assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))

    def test_volumes_and_the_gpu_file_name_what_exists(self, compose: dict[str, Any]) -> None:
        for service in compose["services"].values():
            for volume in service.get("volumes", []):
                source = re.sub(r"\$\{\w+:-(.*?)\}", r"\1", volume).split(":")[0]
                assert source.startswith("./") or source in compose["volumes"]
        gpu = yaml.safe_load((DOCKER / "compose.gpu.yaml").read_text())
        assert gpu["services"].keys() <= compose["services"].keys()


class TestKubeRay:
    def test_the_cluster_runs_our_ray_behind_a_token(self, objects: list[dict[str, Any]]) -> None:
        spec = one(objects, "RayCluster", "evomerge")["spec"]
        assert RAY is not None
        assert spec["rayVersion"] == RAY[1]
        assert spec["authOptions"]["mode"] == "token"

    def test_it_grows_from_nothing_and_the_head_runs_no_worker(
        self, objects: list[dict[str, Any]]
    ) -> None:
        spec = one(objects, "RayCluster", "evomerge")["spec"]
        assert spec["enableInTreeAutoscaling"] is True
        assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
        groups = {group["groupName"]: group for group in spec["workerGroupSpecs"]}
        assert any("spot" in name for name in groups)
        for group in groups.values():
            assert group["minReplicas"] == 0 < group["maxReplicas"]
            limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
            assert limits["nvidia.com/gpu"] == "1"

    def test_the_job_names_the_cluster(self, objects: list[dict[str, Any]]) -> None:
        job = one(objects, "RayJob", "evomerge-study")["spec"]
        assert job["clusterSelector"] == {"ray.io/cluster": "evomerge"}
        assert job["entrypoint"].startswith("evomerge run ")
        assert "backoffLimit" not in job, "KubeRay refuses it beside a clusterSelector"

    def test_pods_are_nobody_special_and_bounded(self, objects: list[dict[str, Any]]) -> None:
        found = [pod for thing in objects for pod in pods(thing)]
        assert len(found) == 5
        for pod in found:
            assert pod["securityContext"]["runAsNonRoot"] is True
            for container in pod["containers"]:
                assert container["resources"]["limits"]["memory"]
                assert container["securityContext"]["allowPrivilegeEscalation"] is False

    def test_ray_pods_answer_probes_that_need_nothing_but_python(
        self, objects: list[dict[str, Any]]
    ) -> None:
        """KubeRay's own call wget, which the slim images lack: it would end every pod."""
        for container in (pod["containers"][0] for pod in ray_pods(objects)):
            for probe in (container["livenessProbe"], container["readinessProbe"]):
                assert probe["exec"]["command"][:2] == ["python", "-c"]
                compile(probe["exec"]["command"][2], "probe", "exec")

    def test_a_node_is_not_killed_while_ray_drains_it(self, objects: list[dict[str, Any]]) -> None:
        for pod in ray_pods(objects):
            environment = {e["name"]: e.get("value") for e in pod["containers"][0]["env"]}
            drain_s = float(environment.get("RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S") or 30)
            assert drain_s < pod["terminationGracePeriodSeconds"]

    def test_what_must_not_be_evicted_is_selected_by_its_budget(
        self, objects: list[dict[str, Any]]
    ) -> None:
        database = one(objects, "StatefulSet", "evomerge-postgres")["spec"]["template"]["metadata"]
        budget = one(objects, "PodDisruptionBudget", "evomerge-postgres")["spec"]
        assert budget["selector"]["matchLabels"] == database["labels"]
        head = one(objects, "PodDisruptionBudget", "evomerge-head")["spec"]["selector"]
        name = one(objects, "RayCluster", "evomerge")["metadata"]["name"]
        assert head["matchLabels"] == {"ray.io/cluster": name, "ray.io/node-type": "head"}

    def test_a_job_that_is_stopped_may_finish_its_attempts(
        self, objects: list[dict[str, Any]]
    ) -> None:
        job = one(objects, "RayJob", "evomerge-study")["spec"]
        environment = yaml.safe_load(job["runtimeEnvYAML"])["env_vars"]
        assert int(environment["RAY_JOB_STOP_WAIT_TIME_S"]) >= 600

    def test_every_name_that_is_used_is_there(self, objects: list[dict[str, Any]]) -> None:
        secret = one(objects, "Secret", "evomerge-store")["stringData"]
        claims = {o["metadata"]["name"] for o in objects if o["kind"].endswith("VolumeClaim")}
        for pod in (pod for thing in objects for pod in pods(thing)):
            volumes = {volume["name"]: volume for volume in pod.get("volumes", [])}
            for container in [*pod["containers"], *pod.get("initContainers", [])]:
                for entry in container.get("env", []):
                    if "valueFrom" in entry:
                        reference = entry["valueFrom"]["secretKeyRef"]
                        assert reference["name"] == "evomerge-store"
                        assert reference["key"] in secret
                for mount in container.get("volumeMounts", []):
                    assert mount["name"] in volumes or mount["name"] == "data"
            for volume in volumes.values():
                if "persistentVolumeClaim" in volume:
                    assert volume["persistentVolumeClaim"]["claimName"] in claims
        host = re.search(r"@([\w-]+)/", secret["url"])
        assert host is not None
        one(objects, "Service", host[1])

    def test_gpu_pods_hold_no_database_credentials(self, objects: list[dict[str, Any]]) -> None:
        for group in one(objects, "RayCluster", "evomerge")["spec"]["workerGroupSpecs"]:
            assert "secretKeyRef" not in str(group)

    def test_the_image_is_of_this_version(self, objects: list[dict[str, Any]]) -> None:
        version = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.M)
        assert version is not None
        for pod in (pod for thing in objects for pod in pods(thing)):
            for container in [*pod["containers"], *pod.get("initContainers", [])]:
                image, tag = container["image"].split(":")
                assert not image.startswith("evomerge") or tag == version[1]
