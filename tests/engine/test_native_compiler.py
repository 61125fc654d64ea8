"""Compiling the native kernels, and what happens where that is not possible."""

import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ingine.engine.kernels import native
from ingine.engine.kernels.native.compiler import BuildError, _temporary_folder, build, code_folder
from tests.engine.marks import needs_native


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of one's own."""
    monkeypatch.setenv("INGINE_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A kernel that compiles at once, in place of the real ones."""
    (tmp_path / "src").mkdir()
    monkeypatch.setattr("ingine.engine.kernels.native.compiler.SOURCES", tmp_path / "src")
    source = tmp_path / "src" / "kernel.cpp"
    source.write_text('extern "C" int answer() { return 1; }')
    return source


@needs_native
def test_the_library_is_compiled_once(cache, source):
    first = build()
    made = first.stat().st_mtime_ns
    assert build() == first and first.stat().st_mtime_ns == made
    assert list((cache / "native").iterdir()) == [first], "nothing half made is left beside it"


@needs_native
def test_each_kind_of_cpu_has_a_library_of_its_own(cache, source):
    assert build("x86-64") != build("x86-64-v3")


@needs_native
def test_the_process_has_one_openmp_runtime():
    assert native.library() is not None
    assert len(native.openmp_runtimes(Path("/proc/self/maps").read_text())) == 1


def test_of_several_openmp_runtimes_torch_s_own_is_taken(monkeypatch):
    monkeypatch.setattr(torch, "__file__", "/home/a user/site-packages/torch/__init__.py")
    line = "7f2-7f3 r-xp 0000 08:01 17       "
    others = ["/usr/lib/libgomp.so.1", "/home/a user/site-packages/torchvision.libs/libgomp-1.so.1"]
    own = "/home/a user/site-packages/torch/lib/libgomp.so.1"
    maps = [f"{line}{path}" for path in (*others, own)]
    assert native.openmp_runtimes("\n".join([*maps, "7f4-7f5 rw-p 0000 00:00 0 "])) == {own}
    assert native.openmp_runtimes("\n".join(maps[:2])) == set(others)


def test_no_compiler_costs_speed_and_one_line_in_the_log(monkeypatch, cache, caplog):
    monkeypatch.setenv("CXX", "no-such-compiler")
    native.library.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            assert native.library() is None
            assert native.library() is None
    finally:
        native.library.cache_clear()
    [line] = caplog.messages
    assert "plain torch" in line and "no C++ compiler" in line


@needs_native
def test_cxx_may_be_a_command_with_arguments(monkeypatch, cache, source, tmp_path):
    source.write_text('extern "C" int answer() { return ANSWER; }')
    wrapper = tmp_path / "wrapper"
    wrapper.write_text('#!/bin/sh\nexec "$@"\n')
    wrapper.chmod(0o755)
    compiler = os.environ.get("CXX") or "g++"
    answers = []
    for number in (1, 2):
        monkeypatch.setenv("CXX", f"{wrapper} {compiler} -DANSWER={number}")
        answers.append(native.load(build()).answer())
    assert answers == [1, 2]


@pytest.mark.parametrize("named", ["no-such-compiler -O2", "g++ '"])
def test_what_cxx_names_is_in_the_message(monkeypatch, named):
    monkeypatch.setenv("CXX", named)
    with pytest.raises(BuildError, match=re.escape(repr(named))):
        build()


def test_a_compiler_that_fails_is_quoted(monkeypatch, cache, source, tmp_path):
    script = tmp_path / "broken"
    script.write_text("#!/bin/sh\necho 'internal compiler error' >&2\nexit 1\n")
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    with pytest.raises(BuildError, match="internal compiler error"):
        build()


@needs_native
def test_a_cache_that_cannot_be_written_is_no_reason_to_die(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("INGINE_CACHE_DIR", str(tmp_path / "file"))
    assert not build().is_relative_to(tmp_path)


def test_a_machine_without_any_place_to_write_is_no_reason_to_die_either(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "file"))
    _temporary_folder.cache_clear()
    with pytest.raises(BuildError, match="no place is safe"):
        code_folder(tmp_path / "file" / "native", "INGINE_CACHE_DIR")


@needs_native
def test_another_source_is_another_library(cache, source):
    first = build()
    source.write_text('extern "C" int answer() { return 2; }')
    second = build()
    assert [native.load(first).answer(), native.load(second).answer()] == [1, 2]


@needs_native
def test_two_processes_may_build_at_the_same_time(cache, source):
    code = (
        "import sys; from pathlib import Path; from ingine.engine.kernels.native import compiler;"
        "compiler.SOURCES = Path(sys.argv[1]); print(compiler.build())"
    )
    command = [sys.executable, "-c", code, str(source.parent)]
    builds = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    first, second = (build.communicate()[0].strip() for build in builds)
    assert first == second
    assert native.load(Path(first)).answer() == 1
    assert len(list((cache / "native").iterdir())) == 1
