"""No call lets transformers run code that a model contains, or ask whether it may."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("ingine", "gateway", "worker", "producer", "benchmarks")


def calls(path: Path) -> list[ast.Call]:
    """The calls that load something by name or folder, and those with an argument about remote code."""
    return [
        node
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and (
            (isinstance(node.func, ast.Attribute) and node.func.attr == "from_pretrained")
            or any(keyword.arg == "trust_remote_code" for keyword in node.keywords)
        )
    ]


def test_every_call_says_that_remote_code_is_not_trusted():
    found = [
        (path, call) for name in PACKAGES for path in (ROOT / name).rglob("*.py") for call in calls(path)
    ]
    assert len(found) >= 7
    for path, call in found:
        said = [ast.unparse(each.value) for each in call.keywords if each.arg == "trust_remote_code"]
        assert said == ["False"], f"{path.relative_to(ROOT)}:{call.lineno}"
