"""The files in deploy/ agree with the settings and the keys."""

import configparser
import shutil
import subprocess

import pytest
import yaml

from ingine.contract.keys import Keys
from ingine.worker.settings import ENV_PREFIX, WorkerSettings
from tests.docs.tables import ROOT

UNIT = ROOT / "deploy" / "ingine-worker.service"


def test_the_unit_gives_a_worker_time_to_hand_over():
    unit = configparser.ConfigParser(interpolation=None, strict=False)
    unit.optionxform = str
    unit.read(UNIT)
    service = unit["Service"]
    assert service["KillSignal"] == "SIGTERM"
    assert int(service["TimeoutStopSec"]) > WorkerSettings.model_fields["drain_timeout_s"].default
    assert service["ExecStart"].endswith("/ingine worker")


def test_all_caches_of_the_unit_are_in_its_cache_directory():
    """A dynamic user has no home directory, where a model of a hub would be kept otherwise."""
    lines = [line for line in UNIT.read_text().splitlines() if line.startswith("Environment=")]
    words = " ".join(line.removeprefix("Environment=") for line in lines).split()
    variables = dict(word.split("=", 1) for word in words)
    for name in ("INGINE_CACHE_DIR", "HF_HOME", "TRITON_CACHE_DIR"):
        assert f"{variables[name]}/".startswith("/var/cache/ingine/")


def test_systemd_takes_the_unit(tmp_path):
    if not shutil.which("systemd-analyze"):
        pytest.skip("systemd-analyze is not installed")
    # The program need not be installed here, but has to exist to be verified.
    unit = tmp_path / UNIT.name
    unit.write_text(UNIT.read_text().replace("/opt/ingine/bin/ingine", "/bin/true"))
    verified = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True)
    assert UNIT.stem not in verified.stderr, verified.stderr


def test_a_pod_has_time_to_hand_over_and_is_probed_where_a_worker_answers():
    pod = yaml.safe_load((ROOT / "deploy" / "kubernetes.yaml").read_text())["spec"]["template"]["spec"]
    defaults = {name: field.default for name, field in WorkerSettings.model_fields.items()}
    assert pod["terminationGracePeriodSeconds"] > defaults["drain_timeout_s"]
    [worker], secrets_dir = pod["containers"], "INGINE_SECRETS_DIR"
    assert worker["ports"] == [{"name": "metrics", "containerPort": defaults["http_port"]}]
    probes = {name: worker[f"{name}Probe"]["httpGet"] for name in ("startup", "liveness", "readiness")}
    assert all(
        probe["path"] in ("/healthz", "/readyz") and probe["port"] == "metrics" for probe in probes.values()
    )
    known = {f"{ENV_PREFIX}{name.upper()}" for name in defaults} | {secrets_dir}
    assert {variable["name"] for variable in worker["env"]} <= known
    [mount] = worker["volumeMounts"]
    assert {"name": secrets_dir, "value": mount["mountPath"]} in worker["env"]


def test_keda_adds_up_every_jobs_stream():
    spec = yaml.safe_load((ROOT / "deploy" / "keda.yaml").read_text())["spec"]
    streams = {trigger["name"]: trigger["metadata"]["stream"] for trigger in spec["triggers"]}
    assert list(streams.values()) == Keys().all_jobs
    assert spec["advanced"]["scalingModifiers"]["formula"] == " + ".join(streams)
    # With a consumer group the trigger would count that group's pending entries instead.
    assert all("consumerGroup" not in trigger["metadata"] for trigger in spec["triggers"])
