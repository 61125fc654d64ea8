"""Install instructions name `ingine-llm`, a clone, or a wheel. `ingine` is the name of the import."""

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docs.tables import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
FOLDERS = ("benchmarks", "deploy", "docs", "examples", "gateway", "ingine", "producer", "tests", "worker")
SUFFIXES = ("", ".js", ".json", ".md", ".py", ".sh", ".toml", ".txt", ".yaml", ".yml")

COMMAND = re.compile(
    r"\b(?:(?:pipx?|conda|uv tool) install|pip download|(?:uv|poetry) add|uvx)\b([^`\n;|&]*)"
)
REQUIREMENT = re.compile(r"([A-Za-z0-9][\w.-]*|\.)(?:\[([\w,-]*)\])?(.*)")


def texts() -> Iterator[tuple[str, str]]:
    """Name and text of each file with install instructions."""
    tops = [path for path in ROOT.iterdir() if path.is_file()]
    for path in [*tops, *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*"))]:
        ours = path.is_file() and not {"__pycache__", "node_modules"} & set(path.parts)
        if ours and path.suffix in SUFFIXES and path != Path(__file__):
            yield str(path.relative_to(ROOT)), path.read_text()


def requirements(text: str) -> Iterator[tuple[str, set[str]]]:
    """Name and extras of everything that commands in `text` install, and other words that follow."""
    for arguments in COMMAND.findall(text):
        for word in arguments.split():
            if (found := REQUIREMENT.match(word.strip("'\"(),:"))) and not found[3].startswith("/"):
                yield found[1], set(filter(None, (found[2] or "").split(",")))


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("pip install ingine", ("ingine", set())),
        ("python -m pip install -U 'ingine[worker]>=0.1'", ("ingine", {"worker"})),
        ('uv add "ingine-llm[worker,embedded]"', ("ingine-llm", {"worker", "embedded"})),
        ("(`pip install '.[worker]'`)", (".", {"worker"})),
    ],
)
def test_the_search_finds_what_it_looks_for(line, expected):
    assert expected in list(requirements(line))


def test_nobody_is_told_to_install_ingine():
    wrong = [name for name, text in texts() if "ingine" in dict(requirements(text))]
    assert wrong == []


def test_extras_are_those_of_ingine_llm():
    wrong = [name for name, text in texts() if re.search(r"\bingine\[[a-z]", text)]
    assert wrong == []


def test_there_is_what_we_tell_people_to_install():
    told = [
        extras for _, text in texts() for name, extras in requirements(text) if name in ("ingine-llm", ".")
    ]
    assert len(told) > 8 and set().union(*told) <= PROJECT["optional-dependencies"].keys()
    wheels = {wheel for _, text in texts() for wheel in re.findall(r"ingine[\w.-]*\.whl", text)}
    assert wheels == {f"ingine_llm-{PROJECT['version']}-py3-none-any.whl"}
