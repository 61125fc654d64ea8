"""The `ingine` command in unusual environments: streams, disks, homes, interrupts. No traceback."""

import os
import pwd
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import typer.main

from ingine.cli.main import app
from ingine.engine.kernels.native.compiler import BuildError, build
from ingine.engine.store.model_store import resolve_model
from ingine.errors import ConfigError
from ingine.paths import cache_root
from ingine.worker.embedded import default_data_dir
from tests.tiny_models import make_tiny_model

INTERRUPTED_WHILE_IT_IMPORTS = """
import sys
module = sys.argv.pop()
class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == module:
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupt())
from ingine.__main__ import main
main()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model for `ingine pull`, the command that does the least with a model."""
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "model", num_layers=1)


def shell(command: str, **variables: str) -> subprocess.CompletedProcess:
    """Run a shell command, in which $INGINE is the program."""
    ingine = f"{sys.executable} -m ingine"
    env = {name: value for name, value in os.environ.items() if not name.startswith("INGINE_")}
    env |= {"INGINE": ingine, "COLUMNS": "80"} | variables
    done = subprocess.run(["sh", "-c", command], env=env, capture_output=True, text=True, timeout=120)
    assert "Traceback" not in done.stderr, done.stderr
    return done


def test_a_disk_that_is_full_is_one_line(folder):
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    done = shell(f"$INGINE pull {folder} > /dev/full")
    assert (done.returncode, done.stderr) == (1, "ingine: No space left on device\n")


def test_streams_may_be_closed(folder):
    done = shell(f"$INGINE pull {folder} <&- >&- ")
    assert (done.returncode, done.stderr) == (0, "")
    assert shell(f"$INGINE pull {folder} 2>&-").stdout == f"{folder}\n"


def test_a_pipe_may_be_closed():
    done = shell("{ $INGINE worker --help; echo $? >&2; } | head -n 1")
    assert done.stderr.strip() in ("0", "1", "141")  # nothing else on standard error


@pytest.mark.parametrize("module", ["typer", "redis"])
def test_an_interrupt_while_a_command_imports_is_silent(module):
    program = [sys.executable, "-c", INTERRUPTED_WHILE_IT_IMPORTS, "status", "some-job", module]
    done = subprocess.run(program, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (130, "")


def test_an_interrupt_while_a_command_runs_is_exit_status_130(monkeypatch):
    """The status is ours: Typer's depends on its version."""
    monkeypatch.setattr("ingine.producer.Client", Mock(side_effect=KeyboardInterrupt))
    command = typer.main.get_command(app)
    with (
        pytest.raises(typer.Exit) as ended,
        command.make_context("ingine", ["status", "some-job"]) as context,
    ):
        command.invoke(context)
    assert ended.value.exit_code == 130


def test_a_foreign_variable_is_a_warning_and_a_misspelled_one_an_error(folder):
    done = shell(f"$INGINE pull {folder}", INGINE_IMAGE_TAG="1")
    assert done.stderr == "ingine: warning: INGINE_IMAGE_TAG is not a setting, and is ignored\n"
    assert done.stdout == f"{folder}\n"
    done = shell(f"$INGINE pull {folder}", INGINE_CACHE_DIRS="1")
    assert done.returncode == 2 and done.stderr.endswith("did you mean INGINE_CACHE_DIR?\n")
    assert shell("$INGINE pull --help", INGINE_CACHE_DIRS="1").returncode == 0


@pytest.fixture
def homeless(monkeypatch) -> None:
    """Remove the home, as in a container that runs under a bare user id."""

    def unknown(uid: int):
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    for name in ("HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME", "INGINE_CACHE_DIR", "INGINE_DATA_DIR"):
        monkeypatch.delenv(name, raising=False)


def test_a_user_without_a_home_is_told_which_setting_names_a_folder(homeless, monkeypatch, tmp_path):
    for look, setting in ((cache_root, "INGINE_CACHE_DIR"), (default_data_dir, "INGINE_DATA_DIR")):
        with pytest.raises(ConfigError, match=f"this user has no home directory. Set {setting} to a folder"):
            look()
        monkeypatch.setenv(setting, str(tmp_path))
        assert look() == tmp_path
    with pytest.raises(ConfigError, match=r"~/model cannot be found: .* Set INGINE_MODEL"):
        resolve_model("~/model")


def test_kernels_that_cannot_be_kept_are_done_without(homeless):
    """After a BuildError, `ingine.engine.kernels.native` computes in torch."""
    with pytest.raises(BuildError, match="INGINE_CACHE_DIR"):
        build()


@pytest.mark.parametrize("name", ["smollm2", "model.gguf"])
def test_a_cache_that_cannot_be_written_is_named_with_its_setting(tmp_path, monkeypatch, name):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("INGINE_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match=f"{tmp_path}/file.* INGINE_CACHE_DIR names another folder"):
        resolve_model(name)
