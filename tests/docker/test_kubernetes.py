"""Kubernetes manifests: valid in several versions' schemas, and consistent with the image and the code."""

from __future__ import annotations

import pytest
from support.manifests import OVERLAYS, ROOT, container_of, environment_of, job_of, rendered

from cmae.train.config_parser import load_recipe

VERSIONS = ("1.29", "1.31", "1.33", "1.35", "1.37")


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_manifests_are_valid_in_the_schema_of(version: str, overlay: str) -> None:
    validate = pytest.importorskip("kubernetes_validate").validate
    documents = rendered(overlay)
    assert {one["kind"] for one in documents} == {"Job", "Service", "PodDisruptionBudget"}
    for document in documents:
        validate(document, version, strict=True)


def test_an_invalid_manifest_would_be_seen() -> None:
    validate = pytest.importorskip("kubernetes_validate")
    job = job_of("base")
    job["spec"]["podFailurePolicy"]["rules"][0]["acton"] = "Ignore"
    with pytest.raises(validate.ValidationError):
        validate.validate(job, VERSIONS[-1], strict=True)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_pods_are_as_many_as_nodes_and_meet_under_a_name_that_there_is(overlay: str) -> None:
    spec, environment = job_of(overlay)["spec"], environment_of(overlay)
    assert spec["completions"] == spec["parallelism"] == int(environment["NNODES"])
    services = {
        one["metadata"]["name"]: one for one in rendered(overlay) if one["kind"] == "Service"
    }
    name, subdomain = job_of(overlay)["metadata"]["name"], spec["template"]["spec"]["subdomain"]
    assert environment["MASTER_ADDR"] == f"{name}-0.{subdomain}"
    service, metrics = services[subdomain], services["cmae-metrics"]
    assert service["spec"]["publishNotReadyAddresses"]
    assert service["spec"]["selector"].items() <= spec["template"]["metadata"]["labels"].items()
    assert str(service["spec"]["ports"][0]["port"]) == environment["MASTER_PORT"]
    # Metrics are those of the first pod, at the port where the run shows them.
    index = "batch.kubernetes.io/job-completion-index"
    labels = {**spec["template"]["metadata"]["labels"], index: "0"}
    assert metrics["spec"]["selector"] == labels
    port = metrics["spec"]["ports"][0]["port"]
    assert f"--run.prometheus_port={port}" in container_of(overlay)["args"]
    assert {"name": "metrics", "containerPort": port} in container_of(overlay)["ports"]


def test_a_stop_is_told_from_a_fault_and_has_time_for_its_checkpoint() -> None:
    spec = job_of("base")["spec"]
    actions = {
        value: rule["action"]
        for rule in spec["podFailurePolicy"]["rules"]
        for value in rule.get("onExitCodes", {}).get("values", [])
    }
    assert actions == {75: "Ignore", 2: "FailJob"}
    assert spec["template"]["spec"]["restartPolicy"] == "Never"  # the policy asks for it
    entrypoint = (ROOT / "docker" / "entrypoint.sh").read_text()
    (patience,) = (
        int(line.split(":-")[1].split("}")[0])
        for line in entrypoint.splitlines()
        if "TORCH_ELASTIC_SHUTDOWN_TIMEOUT=" in line
    )
    assert spec["template"]["spec"]["terminationGracePeriodSeconds"] > patience


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_argument_is_a_setting_that_there_is(overlay: str) -> None:
    command, *words = container_of(overlay)["args"]
    assert command == "pretrain"
    settings = dict(word.removeprefix("--").split("=", 1) for word in words)
    recipe = settings.pop("recipe")
    config = load_recipe(recipe, overrides=settings)
    mounts = {one["mountPath"] for one in container_of(overlay)["volumeMounts"]}
    assert f"/{config.run.out.parts[1]}" in mounts
    if config.data.cache_dir is None:
        assert f"/{str(config.data.shards).split('/')[1]}" in mounts
    else:
        assert str(config.data.cache_dir) in mounts


def test_the_container_is_hardened_and_can_write_where_the_image_does() -> None:
    container, pod = container_of("base"), job_of("base")["spec"]["template"]["spec"]
    assert container["securityContext"] == {
        "readOnlyRootFilesystem": True,
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
    }
    assert pod["securityContext"]["runAsNonRoot"]
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    volumes = {one["name"]: one for one in pod["volumes"]}
    assert {one["name"] for one in container["volumeMounts"]} == set(volumes)
    assert volumes["shm"]["emptyDir"]["medium"] == "Memory"
    written = {one["mountPath"] for one in container["volumeMounts"] if not one.get("readOnly")}
    assert {"/runs", "/tmp", "/cache", "/dev/shm"} <= written
