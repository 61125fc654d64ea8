"""A pytest plugin that skips tests whose path this machine cannot run, and counts run and skipped ones
(`paths.py`)."""

from collections import Counter
from collections.abc import Iterable
from functools import cache

import pytest

from tests.paths import PATHS

PROPERTY = "path"


@cache
def is_here(path: str) -> bool:
    return PATHS[path]()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    paths = [mark.args[0] for mark in item.iter_markers(PROPERTY)]
    # Reports have the properties, and reach the summary from other processes too.
    item.user_properties += [(PROPERTY, path) for path in paths]
    for path in paths:
        if not is_here(path):
            pytest.skip(f"not on this machine: {path}")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    ran = count(report for report in terminalreporter.getreports("passed") if report.when == "call")
    skipped = count(terminalreporter.getreports("skipped"))
    if not ran and not skipped:
        return
    terminalreporter.section("paths of the code on this machine")
    terminalreporter.line("run here: " + listed(ran))
    absent = Counter({path: number for path, number in skipped.items() if not is_here(path)})
    terminalreporter.line("not run here: " + listed(absent))


def count(reports: Iterable[pytest.TestReport]) -> Counter[str]:
    """The number of tests by path."""
    return Counter(path for report in reports for name, path in report.user_properties if name == PROPERTY)


def listed(tests: Counter[str]) -> str:
    return ", ".join(f"{path} ({number})" for path, number in sorted(tests.items())) or "none"
