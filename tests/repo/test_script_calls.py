"""Each Lua script has one typed call beside it, which alone knows the order of its keys and arguments."""

import ast
from collections import Counter
from pathlib import Path

from ingine.contract.calls import producing

ROOT = Path(__file__).resolve().parents[2]
CONTRACT = ROOT / "ingine" / "contract"
SCRIPTS = {path.stem for path in (CONTRACT / "scripts").glob("*.lua") if "\n-- ARGV" in path.read_text()}
"""The scripts that are called. The other files are included in them."""


def literals_read_by(path: Path) -> list[str]:
    """The names that `path` gives to `read_script`."""
    return [
        node.args[0].value
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and getattr(node.func, "id", None) == "read_script"
        and isinstance(node.args[0], ast.Constant)
    ]


def test_a_script_that_is_included_has_neither_keys_nor_arguments():
    for path in (CONTRACT / "scripts").glob("*.lua"):
        code = [line for line in path.read_text().splitlines() if not line.startswith("--")]
        assert ("KEYS" in "".join(code) or "ARGV" in "".join(code)) == (path.stem in SCRIPTS), path


def test_each_script_has_one_call():
    calls = Counter(name for path in (CONTRACT / "calls").glob("*.py") for name in literals_read_by(path))
    assert calls == Counter(SCRIPTS)


def test_no_other_code_reads_a_script():
    for top in ("ingine", "gateway", "producer", "worker", "benchmarks"):
        for path in (ROOT / top).rglob("*.py"):
            if not path.is_relative_to(CONTRACT):
                assert "contract.scripts" not in path.read_text(), path


def test_those_of_producers_are_searched_for_the_line_of_an_error():
    assert len(producing.sources()) == len(literals_read_by(Path(producing.__file__)))
