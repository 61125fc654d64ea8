"""All output of commands goes through `ingine.terminal.echo`, since a terminal obeys control characters."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PRINTS_FOR_PROGRAMS = ("ingine/demo/producer.py",)
"""Files that print JSON into a pipe."""


def test_nothing_prints_by_itself():
    sources = [
        path
        for package in ("ingine", "gateway", "producer", "worker")
        for path in (ROOT / package).rglob("*.py")
    ]
    assert sources
    for path in sources:
        if path.relative_to(ROOT).as_posix() in PRINTS_FOR_PROGRAMS:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                files = [ast.unparse(keyword.value) for keyword in node.keywords if keyword.arg == "file"]
                to_a_file = files and files[0] not in ("sys.stdout", "sys.stderr")
                assert called not in ("typer.echo", "click.echo", "typer.secho"), f"{path}:{node.lineno}"
                assert called != "print" or to_a_file, f"{path}:{node.lineno}"
