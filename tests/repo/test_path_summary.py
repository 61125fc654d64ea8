"""The summary of a run names the paths of the code that it took, and those that this machine lacks."""

import pytest

from tests.paths import PATHS, needs

pytest_plugins = ("pytester",)

TESTS = """
from tests.paths import needs

@needs("a path that is here")
def test_one():
    pass

@needs("a path that is here")
@needs("a path of another machine")
def test_two():
    assert False
"""


def test_tests_of_absent_paths_are_skipped_and_counted(pytester, monkeypatch):
    monkeypatch.setitem(PATHS, "a path that is here", lambda: True)
    monkeypatch.setitem(PATHS, "a path of another machine", lambda: False)
    pytester.makepyfile(TESTS)
    result = pytester.runpytest_inprocess("-p", "tests.path_summary")
    result.assert_outcomes(passed=1, skipped=1)
    result.stdout.fnmatch_lines(
        ["run here: a path that is here (1)", "not run here: a path of another machine (1)"]
    )


def test_a_path_that_nobody_defined_is_no_reason_to_skip():
    with pytest.raises(AssertionError, match="no such path"):
        needs("no such path")
