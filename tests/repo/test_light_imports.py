"""Nothing is imported before it is needed: help needs no client, and importing the producer no redis."""

import subprocess
import sys

import pytest

from tests.tiny_models import make_tiny_model
from tests.waiting import HANGS_S

TORCH = {"torch", "transformers", "numpy", "tokenizers"}
CLIENT = {"redis", "asyncio", "ssl", "pydantic", "pydantic_settings", "msgpack", "importlib.metadata"}

COMMAND = """
import sys
from ingine.__main__ import main
sys.argv = ["ingine", *sys.argv[1:]]
try:
    main()
finally:
    print(*sys.modules, file=sys.stderr)
"""


def modules_after(program: str, *arguments: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=HANGS_S
    )
    assert "Traceback" not in done.stderr, done.stderr
    return set(done.stderr.splitlines()[-1].split())


@pytest.mark.parametrize(
    ("program", "none_of"),
    [
        ("import ingine.producer", CLIENT | TORCH | {"typer", "rich"}),
        ("import ingine", CLIENT | TORCH | {"typer", "rich"}),
        ("from ingine.producer import JobFailed, Priority", CLIENT | TORCH | {"typer", "rich"}),
        ("from ingine.producer import Client", TORCH | {"typer", "rich"}),
        ("from ingine import AsyncClient, Client, SamplingParams", TORCH | {"typer", "rich"}),
    ],
)
def test_a_program_that_imports(program: str, none_of: set[str]):
    found = modules_after(f"import sys; {program}; print(*sys.modules, file=sys.stderr)")
    assert "ingine" in found
    assert not found & none_of


@pytest.mark.parametrize(
    ("arguments", "none_of"),
    [
        (["--help"], CLIENT | TORCH | {"rich"}),
        (["--version"], CLIENT | TORCH | {"rich"}),
        # typer itself loads pydantic for a command's options.
        (["status", "--help"], TORCH | {"redis", "asyncio", "rich"}),
        (["queue", "--help"], TORCH | {"redis", "asyncio", "rich"}),
        (["top", "--help"], TORCH | {"redis", "asyncio", "rich"}),
        (["worker", "--help"], TORCH | {"rich"}),
        (["acl", "--queue", "chat", "worker"], TORCH | {"redis", "asyncio", "rich"}),
        (["generate", "--temperature", "-1", "hi"], TORCH | {"redis", "asyncio", "rich"}),
        (["status", "x", "--redis-url", "redis://127.0.0.1:1/0"], TORCH | {"rich", "ingine.worker.settings"}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_command(arguments: list[str], none_of: set[str]):
    found = modules_after(COMMAND, *arguments)
    assert "ingine.cli.main" in found
    assert not found & none_of


def test_generating_needs_nothing_slow_beside_torch(tmp_path):
    model = make_tiny_model(tmp_path, num_layers=1)
    found = modules_after(COMMAND, "generate", "--model", str(model), "--max-tokens", "2", "hi")
    assert "torch" in found and "ingine.engine.llm" in found
    assert not found & {"transformers", "torch._dynamo", "sympy", "redis", "rich"}
