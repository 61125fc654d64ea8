"""Every benchmark can be found: benchmarks/README.md lists all of them."""

import re

from tests.docs.tables import ROOT

PARTS = {
    "first_token.py",
    "four_bits.py",
    "machine.py",
    "schema_walks.py",
    "speculation_texts.py",
    "stand_in.py",
    "watched_worker.py",
    "worst_jobs.py",
}
"""Files that the others import or start."""


def test_every_script_is_in_the_table():
    text = (ROOT / "benchmarks" / "README.md").read_text()
    commands = re.findall(r"^\| `python benchmarks/(\w+\.py)` \|", text, re.MULTILINE)
    files = {path.name for path in (ROOT / "benchmarks").glob("*.py")}
    assert sorted(commands) == sorted(files - PARTS - {"__init__.py"})
    assert all(f"`{part}`" in text for part in PARTS)
