"""The compose file and its images, as far as they can be checked without an engine that runs them."""

from pathlib import Path

import pytest
import yaml

from ingine.gateway.settings import GatewaySettings
from ingine.worker.settings import WorkerSettings

ROOT = Path(__file__).resolve().parents[2]
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES = COMPOSE["services"]
DOCKERFILE = (ROOT / "Dockerfile").read_text()


def test_the_server_is_durable_checked_and_never_evicts():
    valkey = SERVICES["valkey"]
    given, inside, _ = next(volume for volume in valkey["volumes"] if ".conf" in volume).split(":")
    assert valkey["command"] == f"valkey-server {inside}"
    lines = (ROOT / given).read_text().splitlines()
    assert {"appendonly yes", "maxmemory-policy noeviction"} < set(lines)
    assert valkey["healthcheck"]["test"][0] == "CMD"
    assert "valkey:/data" in valkey["volumes"]


@pytest.mark.parametrize(("service", "profile"), [("worker-cpu", "cpu"), ("worker-gpu", "gpu")])
def test_a_worker_for_each_profile_has_time_to_hand_over(service, profile):
    worker = SERVICES[service]
    assert worker["profiles"] == [profile]
    drain_timeout_s = WorkerSettings.model_fields["drain_timeout_s"].default
    assert int(worker["stop_grace_period"].removesuffix("s")) > drain_timeout_s
    assert worker["depends_on"]["valkey"]["condition"] == "service_healthy"
    port = WorkerSettings.model_fields["http_port"].default
    assert f":{port}/readyz" in worker["healthcheck"]["test"][-1]


def test_a_gateway_without_keys_is_published_on_loopback_only():
    gateway = SERVICES["gateway"]
    assert gateway["environment"]["INGINE_GATEWAY_WITHOUT_KEYS"] == "true"
    port = GatewaySettings.model_fields["gateway_port"].default
    assert gateway["ports"] == [f"127.0.0.1:{port}:{port}"]
    assert f":{port}/health" in gateway["healthcheck"]["test"][-1]


@pytest.mark.parametrize("name", sorted(SERVICES))
def test_every_reference_of_a_service_is_defined(name):
    service = SERVICES[name]
    for volume in service.get("volumes", []):
        source = volume.partition(":")[0]
        assert source in COMPOSE["volumes"] or (source.startswith("./") and (ROOT / source).is_file())
    if "build" in service:
        assert f" AS {service['build']['target']}\n" in DOCKERFILE
    for variable in service.get("environment", {}):
        settings = GatewaySettings if name == "gateway" else WorkerSettings
        assert variable.removeprefix("INGINE_").lower() in settings.model_fields


def test_what_the_image_copies_is_there_and_not_ignored():
    wanted = (ROOT / ".dockerignore").read_text().splitlines()
    for line in DOCKERFILE.splitlines():
        if line.startswith("COPY "):
            *names, _ = line.split()[1:]
            for name in names:
                assert (ROOT / name).exists(), name
                assert f"!{name}" in wanted, name


def test_all_caches_of_the_worker_are_in_its_volume():
    """A model of a hub, or a compiled kernel, that is kept elsewhere is lost with the container."""
    instructions = [line.partition(" ") for line in DOCKERFILE.splitlines()]
    [volume] = [words for name, _, words in instructions if name == "VOLUME"]
    words = " ".join(words for name, _, words in instructions if name == "ENV").split()
    variables = dict(word.split("=", 1) for word in words)
    for name in ("INGINE_CACHE_DIR", "HF_HOME", "TRITON_CACHE_DIR"):
        assert f"{variables[name]}/".startswith(f"{volume}/")
    for service in ("worker-cpu", "worker-gpu"):
        assert f"models:{volume}" in SERVICES[service]["volumes"]
