"""docs/security.md names a test for each claim, and each test exists."""

import re

import pytest

from tests.docs.tables import ROOT

SECURITY = (ROOT / "docs" / "security.md").read_text()
NAMED = re.findall(r"`([\w/]+\.py)::(test_\w+)`", SECURITY)
COLUMN = "shown by"


@pytest.mark.parametrize(("path", "name"), sorted(set(NAMED)))
def test_a_test_that_the_document_names_exists(path, name):
    assert re.search(rf"^(async )?def {name}\(", (ROOT / "tests" / path).read_text(), re.MULTILINE)


def test_every_row_of_the_threat_model_names_a_test():
    """A row may also say that nothing stops the attack, with a test of that."""
    tables = re.findall(r"^\|.*\n(?:\|.*\n)+", SECURITY, re.MULTILINE)
    rows = [
        row
        for table in tables
        for row in table.splitlines()[2:]
        if table.splitlines()[0].rstrip(" |").endswith(COLUMN)
    ]
    assert len(rows) > 20
    for row in rows:
        last = row.strip().strip("|").rpartition("|")[2]
        assert re.search(r"`[\w/]+\.py::test_\w+`", last), row


def test_what_looks_like_a_test_is_named_as_one():
    assert SECURITY.count("::") == len(NAMED)
