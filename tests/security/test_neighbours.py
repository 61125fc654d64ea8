"""Other users of this machine: files that they plant are neither loaded nor trusted."""

import errno
import logging
import os
import subprocess
import sys
from ctypes import CDLL
from pathlib import Path
from types import SimpleNamespace

import pytest

from ingine.connect.environment import check_variables
from ingine.engine.kernels.native import compiler
from ingine.engine.kernels.select import _cache_obstacle
from ingine.engine.store.model_store import DEFAULT_MODEL, resolve_model
from ingine.errors import ConfigError
from ingine.private_files import (
    Untrusted,
    _is_group_of_one,
    make_private,
    own_folder,
    read_private,
    trusted,
    write_private,
)
from ingine.producer.batch_files import RowFile
from tests.engine.marks import needs_native
from tests.security.neighbours import NEIGHBOUR, become_the_neighbour, needs_root
from tests.waiting import HANGS_S

ROOT = Path(__file__).resolve().parents[2]

BUILD = """
import sys
from ingine.engine.kernels.native import compiler, load
from pathlib import Path
compiler.SOURCES = Path(sys.argv[1])
library = compiler.build()
print(library, load(library).answer())
"""
EVIL = """
#include <cstdio>
#include <cstdlib>
__attribute__((constructor)) static void attack() { fclose(fopen("{marker}", "w")); }
extern "C" int answer() { return 666; }
"""


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder that only this user can write, like all folders above it."""
    (tmp_path / "safe").mkdir(mode=0o700)
    return trusted(tmp_path / "safe")


@pytest.fixture
def sources(folder, monkeypatch) -> Path:
    """A kernel that compiles quickly, in place of the real ones, and a separate cache."""
    (folder / "src").mkdir()
    (folder / "src" / "kernel.cpp").write_text('extern "C" int answer() { return 1; }')
    monkeypatch.setattr(compiler, "SOURCES", folder / "src")
    monkeypatch.setenv("INGINE_CACHE_DIR", str(folder / "cache"))
    return folder / "src"


def compiled(text: str, to: Path) -> Path:
    source = to.with_suffix(".cpp")
    source.write_text(text)
    subprocess.run(["g++", "-shared", "-fPIC", source, "-o", to], check=True)
    return to


def test_a_file_of_ours_in_a_folder_of_ours_is_trusted(folder):
    (folder / "file").touch(mode=0o600)
    (folder / "link").symlink_to("file")
    assert trusted(folder / "link") == folder / "file"


@pytest.mark.parametrize("what", ["file", "folder", "folder above", "target of a link"])
def test_what_belongs_to_another_user_is_not_trusted(folder, give_away, what):
    (folder / "inner").mkdir()
    (folder / "inner" / "file").touch(mode=0o600)
    (folder / "link").symlink_to("inner/file")
    give_away({"file": folder / "inner" / "file", "folder above": folder}.get(what, folder / "inner"))
    with pytest.raises(Untrusted, match="belongs to another user"):
        trusted(folder / ("link" if what == "target of a link" else "inner/file"))


@pytest.mark.parametrize(("changed", "bits"), [("file", 0o602), ("file", 0o620), (".", 0o702), (".", 0o720)])
def test_what_others_can_write_is_not_trusted(folder, monkeypatch, changed, bits):
    monkeypatch.setattr("ingine.private_files._is_group_of_one", lambda gid, uid: False)
    (folder / "file").touch(mode=0o600)
    (folder / changed).chmod(bits)
    with pytest.raises(Untrusted, match="can be written by"):
        trusted(folder / "file")


@pytest.mark.parametrize(
    ("group", "is_his_alone"),
    [(("me", []), True), (("me", ["me"]), True), (("me", ["you"]), False), (("staff", []), False)],
)
def test_a_group_may_write_that_is_its_user_alone(monkeypatch, group, is_his_alone):
    monkeypatch.setattr("ingine.private_files.user_name", lambda uid: "me")
    monkeypatch.setattr("ingine.private_files._group", lambda gid: group)
    assert _is_group_of_one(1234, 1234) == is_his_alone


@needs_root
@needs_native
def test_a_library_in_a_folder_of_another_user_is_not_loaded(sources, give_away, caplog):
    planted = compiler.build()
    os.replace(compiled(EVIL.replace("{marker}", os.devnull), planted.with_name("evil.so")), planted)
    give_away(planted.parent)
    with caplog.at_level(logging.WARNING):
        ours = compiler.build()
    assert ours != planted and CDLL(ours).answer() == 1
    assert f"{planted.parent} belongs to another user" in caplog.text and "INGINE_CACHE_DIR" in caplog.text


@needs_native
def test_a_library_that_others_could_write_is_compiled_again(sources):
    planted = compiler.build()
    os.replace(compiled(EVIL.replace("{marker}", os.devnull), planted.with_name("evil.so")), planted)
    planted.chmod(0o777)
    assert compiler.build() == planted and CDLL(planted).answer() == 1
    assert trusted(planted) == planted


@needs_native
def test_a_cache_is_made_for_this_user_alone(sources, folder):
    before = os.umask(0)
    try:
        library = compiler.build()
    finally:
        os.umask(before)
    assert library.stat().st_mode & 0o777 == 0o700
    assert [path.stat().st_mode & 0o777 for path in (library.parent, folder / "cache")] == [0o700, 0o700]


@needs_root
@needs_native
def test_an_attack_by_another_user(sources, folder, shared_folder):
    """The attacker knows the path of the library, and writes it first."""
    marker, evil = folder / "attacked", folder / "evil.so"
    compiled(EVIL.replace("{marker}", str(marker)), evil)
    cache = shared_folder / "x"
    digest = compiler._digest(compiler._compiler(), "native")
    planted = cache / "ingine" / "native" / f"{digest}.so"

    plant = f"umask 0; mkdir -p {planted.parent}; cat > {planted}; chmod 755 {planted}"
    with evil.open("rb") as code:
        subprocess.run(["sh", "-c", plant], stdin=code, check=True, preexec_fn=become_the_neighbour)
    assert planted.stat().st_uid == NEIGHBOUR
    env = os.environ | {"XDG_CACHE_HOME": str(cache)}
    del env["INGINE_CACHE_DIR"]
    command = [sys.executable, "-c", BUILD, str(sources)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=HANGS_S)
    assert done.returncode == 0, done.stderr
    loaded, answer = done.stdout.split()
    assert answer == "1" and not marker.exists()
    assert not loaded.startswith(str(shared_folder)) and not Path(loaded).exists(), (
        "it ended with its process"
    )


@needs_root
def test_triton_gets_another_cache_where_its_own_is_not_ours(folder, give_away, monkeypatch):
    (folder / "triton").mkdir()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(folder / "triton"))
    assert _cache_obstacle() is None
    assert os.environ["TRITON_CACHE_DIR"] == str(folder / "triton")
    give_away(folder / "triton")
    assert _cache_obstacle() is None
    used = Path(os.environ["TRITON_CACHE_DIR"])
    assert used != folder / "triton" and trusted(used) == used


@pytest.mark.parametrize("name", [DEFAULT_MODEL, "model.gguf"])
def test_a_model_in_a_folder_of_another_user_is_not_used(folder, give_away, monkeypatch, name):
    monkeypatch.setenv("INGINE_CACHE_DIR", str(folder))
    monkeypatch.chdir(folder)
    (folder / "models").mkdir()
    (folder / "model.gguf").write_bytes(b"GGUF")
    give_away(folder / "models")
    with pytest.raises(ConfigError, match=r"belongs to another user.*INGINE_CACHE_DIR"):
        resolve_model(name)


def test_a_folder_of_ours_is_closed_to_others(folder):
    (folder / "models").mkdir()
    (folder / "models").chmod(0o777)
    assert own_folder(folder / "models", "X") == folder / "models"
    assert (folder / "models").stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("mode", [0o700, 0o755, 0o775])
def test_a_folder_that_nobody_else_can_write_is_left_as_it_is(folder, monkeypatch, mode):
    """Its file system may be read-only. With mode 0775, the group has no other member."""
    monkeypatch.setattr("ingine.private_files._is_group_of_one", lambda gid, uid: True)
    monkeypatch.setattr(Path, "chmod", refused_chmod)
    (folder / "models").mkdir()
    os.chmod(folder / "models", mode)
    assert own_folder(folder / "models", "X") == folder / "models"
    assert (folder / "models").stat().st_mode & 0o777 == mode


def test_a_folder_that_cannot_be_closed_to_others_is_not_used(folder, monkeypatch):
    (folder / "models").mkdir()
    (folder / "models").chmod(0o777)
    monkeypatch.setattr(Path, "chmod", refused_chmod)
    with pytest.raises(ConfigError, match=r"models can be written by every user.* Set X to another folder"):
        own_folder(folder / "models", "X")


def refused_chmod(path: Path, mode: int) -> None:
    raise OSError(errno.EROFS, "Read-only file system", str(path))


def test_a_sticky_folder_is_nobodys(folder, give_away):
    """Files in it belong to their owners."""
    (folder / "tmp").mkdir()
    (folder / "tmp").chmod(0o1777)
    make_private(folder / "tmp" / "ours")
    assert trusted(folder / "tmp" / "ours")
    give_away(folder / "tmp" / "ours")
    with pytest.raises(Untrusted):
        trusted(folder / "tmp" / "ours")


def test_a_secret_is_read_from_a_file_of_ours_alone(folder, give_away):
    secret = folder / "secret"
    assert read_private(secret) is None
    write_private(secret, "s3cret")
    assert read_private(secret) == "s3cret" and secret.stat().st_mode & 0o777 == 0o600
    (folder / "link").symlink_to(secret)
    assert read_private(folder / "link") is None
    os.mkfifo(folder / "fifo")
    assert read_private(folder / "fifo") is None
    secret.chmod(0o640)
    assert read_private(secret) is None
    secret.chmod(0o600)
    give_away(secret)
    assert read_private(secret) is None


def test_results_of_a_batch_are_made_with_the_users_umask(tmp_path):
    before = os.umask(0o077)
    try:
        RowFile(tmp_path / "out.jsonl").close()
    finally:
        os.umask(before)
    assert (tmp_path / "out.jsonl").stat().st_mode & 0o777 == 0o600


@needs_root
def test_settings_that_another_user_has_put_there_are_refused(tmp_path, give_away, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".env").write_text("INGINE_REDIS_URL=redis://his.example/0\n")
    assert check_variables() == []
    give_away(tmp_path / ".env")
    with pytest.raises(ConfigError, match=r"\.env was put there by another user"):
        check_variables()
    give_away(tmp_path)  # the neighbour's folder: a user who works there accepts its contents
    assert check_variables() == []


def test_where_files_have_no_owner_settings_are_taken(tmp_path, monkeypatch):
    """Producers run on Windows, too, which has no user ids to compare."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ingine.private_files.os", SimpleNamespace(name="nt"))
    (tmp_path / ".env").write_text("INGINE_QUEUE=mine\n")
    assert check_variables() == []


def test_what_lies_where_we_are_started_is_not_run(tmp_path):
    """`python -m pip` would run a `pip.py` in the working directory, for example /tmp."""
    for name in ("pip", "typer", "msgpack"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'attacked')!r}, 'w')\n")
    ingine = Path(sys.executable).with_name("ingine")
    env = os.environ | {"INGINE_CACHE_DIR": str(tmp_path / "cache"), "PIP_NO_INDEX": "1"}
    done = subprocess.run(
        [ingine, "demo"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=HANGS_S
    )
    assert done.returncode == 2 and "pip cannot download" in done.stderr, done.stderr
    assert not (tmp_path / "attacked").exists()


def test_no_program_of_ours_is_looked_for_where_we_are_started():
    sources = [
        path for package in ("ingine", "producer", "worker") for path in (ROOT / package).rglob("*.py")
    ]
    started = [path for path in sources if "sys.executable" in path.read_text()]
    assert len(started) > 3
    for path in started:
        assert 'sys.executable, "-m"' not in path.read_text(), f"{path}: -P is missing"
