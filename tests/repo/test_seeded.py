"""Tests draw the same random numbers in each run, so that a failure can be repeated."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
TORCH = {"rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like", "normal"}
TORCH |= {"multinomial", "bernoulli", "poisson"}
GENERATORS = {"Random", "default_rng", "RandomState", "SeedSequence"}
"""Generators of `random` and numpy, which an argument seeds."""
IN_PLACE = {"normal_", "uniform_", "random_", "bernoulli_", "exponential_"}
ALLOWED = {"servers.py": "draws ports, which have to differ between the processes of a run"}


def draws(path: Path) -> Iterator[str]:
    """Each call in the file that draws from an unseeded generator."""
    yield from _draws(ast.parse(path.read_text()), seeded=False)


def _draws(node: ast.AST, *, seeded: bool) -> Iterator[str]:
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        seeded = seeded or any(_name(each).endswith(".manual_seed") for each in ast.walk(node))
    if isinstance(node, ast.Call) and not seeded and _is_unseeded(node):
        yield f"line {node.lineno}: {ast.unparse(node)}"
    for child in ast.iter_child_nodes(node):
        yield from _draws(child, seeded=seeded)


def _is_unseeded(call: ast.Call) -> bool:
    module, _, function = _name(call).rpartition(".")
    if (module == "torch" and function in TORCH) or function in IN_PLACE:
        return "generator" not in {keyword.arg for keyword in call.keywords}
    if module in ("random", "np.random", "numpy.random"):
        return function not in GENERATORS or not call.args
    return False


def _name(node: ast.AST) -> str:
    """`torch.randn` of the call `torch.randn(3)`."""
    if not isinstance(node, ast.Call):
        return ""
    return ast.unparse(node.func)


def test_numbers_are_drawn_from_seeded_generators():
    found = {
        path.relative_to(TESTS).as_posix(): calls
        for path in sorted(TESTS.rglob("*.py"))
        if path.name not in ALLOWED and (calls := list(draws(path)))
    }
    assert not found, "\n".join(f"{path}: {call}" for path, calls in found.items() for call in calls)


@pytest.mark.parametrize(
    ("source", "is_seeded"),
    [
        ("torch.randn(3)", False),
        ("torch.randn(3, generator=generator)", True),
        ("torch.empty(3).normal_()", False),
        ("random.choice([1])", False),
        ("random.Random()", False),
        ("random.Random(7).choice([1])", True),
        ("np.random.rand(3)", False),
        ("np.random.default_rng()", False),
        ("np.random.default_rng(7)", True),
        ("def test():\n    torch.manual_seed(0)\n    torch.randn(3)", True),
        ("def test():\n    torch.randn(3)\ndef other():\n    torch.manual_seed(0)", False),
    ],
)
def test_the_search_sees_what_it_is_for(source, is_seeded, tmp_path):
    (tmp_path / "file.py").write_text(source)
    assert (not list(draws(tmp_path / "file.py"))) == is_seeded
