"""The tables of docs/operations.md agree with the code."""

import ast
import re
from collections.abc import Iterator

import pytest

from ingine.connect.local_server import DEFAULT_URL
from ingine.contract.record import JobStatus
from ingine.gateway.metrics import Metrics as GatewayMetrics
from ingine.gateway.settings import GatewaySettings
from ingine.producer.settings import ProducerSettings
from ingine.worker.metrics import Metrics
from ingine.worker.settings import ENV_PREFIX, WorkerSettings
from tests.docs.tables import ROOT, table

OPERATIONS = "docs/operations.md"
PER_START = {"worker_id": "host-pid"}
"""Defaults that differ from start to start."""


def shown(default: object) -> str:
    if isinstance(default, bool):
        return str(default).lower()
    return "unset" if default is None else str(default)


def test_every_setting_is_there_with_its_default():
    documented = {row["variable"]: row["default"] for row in table(OPERATIONS, "Settings")}
    fields = WorkerSettings.model_fields
    expected = {
        f"{ENV_PREFIX}{name.upper()}": PER_START.get(name) or shown(field.default)
        for name, field in fields.items()
    }
    assert documented == expected


def test_every_setting_of_a_gateway_is_there_with_its_default():
    documented = {row["variable"]: row["default"] for row in table(OPERATIONS, "Settings of a gateway")}
    own = GatewaySettings.model_fields.keys() - ProducerSettings.model_fields.keys()
    expected = {
        f"{ENV_PREFIX}{name.upper()}": shown(GatewaySettings.model_fields[name].default) for name in own
    }
    assert documented == expected


def test_a_producers_settings_are_marked():
    marked = {row["variable"] for row in table(OPERATIONS, "Settings") if row["who"] == "both"}
    assert marked == {f"{ENV_PREFIX}{name.upper()}" for name in ProducerSettings.model_fields}
    assert DEFAULT_URL in (ROOT / OPERATIONS).read_text()


def test_every_other_variable_that_the_code_reads_is_named():
    code = "".join(
        path.read_text()
        for package in ("ingine", "gateway", "worker", "producer")
        for path in (ROOT / package).rglob("*.py")
    )
    read = set(re.findall(r'(?:environ\.get\(|environ\[|user_folder\()"(INGINE_[A-Z_]+)"', code))
    assert read == {"INGINE_CACHE_DIR", "INGINE_DATA_DIR", "INGINE_SECRETS_DIR"}
    text = (ROOT / OPERATIONS).read_text() + (ROOT / "docs" / "howto" / "deploy.md").read_text()
    assert all(f"`{name}`" in text for name in read)


@pytest.mark.parametrize(
    ("metrics", "heading"), [(Metrics, "Metrics"), (GatewayMetrics, "Metrics of a gateway")]
)
def test_every_metric_is_there_with_its_type_and_labels(metrics, heading):
    documented = {row["metric"]: (row["type"], row["labels"]) for row in table(OPERATIONS, heading)}
    expected = {}
    for collector in metrics().registry._collector_to_names:
        (family,) = collector.describe()
        name = f"{family.name}_total" if family.type == "counter" else family.name
        expected[name] = (family.type, ", ".join(getattr(collector, "_labelnames", ())))
    assert documented == expected


def logged_events() -> Iterator[tuple[str, str, str]]:
    """Name, level and fields of every `log_event` call in the worker."""
    for path in sorted([*(ROOT / "worker").rglob("*.py"), ROOT / "ingine" / "cli" / "worker.py"]):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "log_event":
                _, level, name = node.args
                fields = ", ".join(keyword.arg for keyword in node.keywords)
                for each in names_of(name):
                    yield each, level.attr.lower(), fields


def names_of(name: ast.expr) -> list[str]:
    if isinstance(name, ast.Constant):
        return [name.value]
    assert ast.unparse(name) == "f'job {event.status}'"
    return [f"job {status}" for status in JobStatus if status.terminal]


def test_every_log_event_is_there_with_its_fields():
    documented = {(row["event"], row["level"], row["fields"]) for row in table(OPERATIONS, "Logs")}
    assert documented == set(logged_events())


@pytest.mark.parametrize("status", ["0", "1", "2", "130"])
def test_every_exit_status_of_a_worker_is_there(status):
    assert status in {row["status"] for row in table(OPERATIONS, "Signals and exit status")}
