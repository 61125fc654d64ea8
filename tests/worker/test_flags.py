"""The flags of `ingine worker` and its help, as a terminal of 80 columns shows it."""

import re

import pytest
import typer.main
from typer.testing import CliRunner

import ingine.cli.worker
from ingine.cli.main import app
from ingine.worker.settings import WorkerSettings

runner = CliRunner()


@pytest.fixture
def started(monkeypatch, tmp_path) -> list[WorkerSettings]:
    """The settings of each worker that would have been started."""
    monkeypatch.chdir(tmp_path)
    settings = []
    monkeypatch.setattr(ingine.cli.worker, "run_worker", settings.append)
    return settings


def run(*arguments: str, columns: int = 80) -> str:
    result = runner.invoke(app, ["worker", *arguments], env={"COLUMNS": str(columns), "NO_COLOR": "1"})
    assert result.exit_code in (0, 2), result
    return result.output


def test_every_setting_is_a_flag():
    command = typer.main.get_command(app).commands["worker"]
    parameters = command.get_params(typer.Context(command))
    flags = {option for parameter in parameters for option in parameter.opts}
    assert flags >= {f"--{name.replace('_', '-')}" for name in WorkerSettings.model_fields}


def test_help_shows_every_flag_whole_with_its_default_at_80_columns():
    shown = run("--help")
    assert all(len(line) <= 80 for line in shown.splitlines())
    words = shown.split()
    for name, field in WorkerSettings.model_fields.items():
        assert f"--{name.replace('_', '-')}" in words
        if isinstance(field.default, bool):
            assert f"--no-{name.replace('_', '-')}" in words
    text = re.sub(r"\s+", " ", shown)
    for default in (
        "Default: 15.0.",
        "Default: auto.",
        "Choices: debug, info, warning, error.",
        "Default: 9464.",
    ):
        assert default in text


def test_flags_reach_the_settings(started):
    run(
        "--queue",
        "q",
        "--max-num-seqs",
        "5",
        "--kv-cache-bytes=2GiB",
        "--log-json",
        "--no-enable-prefix-caching",
    )
    run("--no-async-scheduling", "--no-log-json")
    first, second = started
    assert (first.queue, first.max_num_seqs, first.kv_cache_bytes) == ("q", 5, 2 << 30)
    assert (first.log_json, first.enable_prefix_caching, first.async_scheduling) == (True, False, None)
    assert (second.log_json, second.enable_prefix_caching, second.async_scheduling) == (False, True, False)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--lease", "3"), "--lease-s"),  # what may have been meant
        (("--queue",), "--queue"),
        (("model",), "model"),
    ],
)
def test_wrong_usage_is_told_without_the_whole_help(started, arguments, says):
    shown = run(*arguments)
    assert says in shown and len(shown.splitlines()) < 10
    assert not started
