"""Every command that a document names exists, and every command and target is documented by its own help."""

import re
import subprocess
from pathlib import Path

import pytest
import typer.main
from typer.testing import CliRunner

from ingine.cli.main import app

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "docker-compose.yml", ROOT / "Makefile"]
)
COMMAND = typer.main.get_command(app)
EXPECTED = {
    *("worker", "generate", "submit", "stream", "batch", "status", "cancel", "queue", "dead", "pull"),
    *("acl", "bench", "demo", "gateway", "keys", "top"),
}

IN_CODE = re.compile(r"```[a-z]*\n(.*?)```|`([^`\n]+)`", re.DOTALL)
INGINE = re.compile(r"(?:^|[|;&(/]\s*|\$ )ingine((?: +[a-z][a-z-]*)+)", re.MULTILINE)
MAKE = re.compile(r"(?:^|[|;&(]\s*|\$ )make +([a-z-]+)", re.MULTILINE)


def code_in(path: Path) -> str:
    text = path.read_text()
    if path.suffix != ".md":
        return text
    return "\n".join(block or span for block, span in IN_CODE.findall(text))


def commands(group=COMMAND, prefix: str = "") -> dict:
    """All commands by their full name: `queue pause` and the like too."""
    found = {}
    for name, command in getattr(group, "commands", {}).items():
        found[f"{prefix}{name}"] = command
        found |= commands(command, f"{prefix}{name} ")
    return found


def test_all_commands_are_there():
    assert set(COMMAND.commands) == EXPECTED


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_documented_ingine_commands_exist(path):
    known = commands()
    for words in INGINE.findall(code_in(path)):
        first, *rest = words.split()
        assert first in known, f"{path.name}: ingine {words.strip()}"
        if rest and hasattr(known[first], "commands"):
            assert f"{first} {rest[0]}" in known, f"{path.name}: ingine {words.strip()}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_documented_make_targets_exist(path):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for target in MAKE.findall(code_in(path)):
        assert target in targets, f"{path.name}: make {target}"


def test_the_search_finds_what_it_looks_for():
    text = "$ ingine queue pause\necho hi | ingine submit --stream\n.venv/bin/ingine demo\n"
    assert [words.split() for words in INGINE.findall(text)] == [["queue", "pause"], ["submit"], ["demo"]]
    assert MAKE.findall("make demo && make test") == ["demo", "test"]


@pytest.mark.parametrize("name", sorted(commands()))
def test_every_command_explains_itself(name):
    command = commands()[name]
    assert command.help and len(command.help) > 10
    parameters = command.get_params(typer.Context(command))
    assert parameters
    for parameter in parameters:
        if parameter.name not in ("help", "install_completion", "show_completion"):
            assert getattr(parameter, "help", None), f"ingine {name}: {parameter.name} has no help"


@pytest.mark.parametrize("group", [(), ("queue",), ("dead",), ("keys",)])
def test_a_list_of_commands_cuts_no_sentence_at_80_columns(group):
    shown = CliRunner().invoke(app, [*group, "--help"], env={"COLUMNS": "80"}).output
    assert "Commands:" in shown and "..." not in shown.partition("Commands:")[2]


def test_make_help_lists_every_target():
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for target in ("demo", "test", "test-all", "bench", "lint", "venv", "clean"):
        assert f"make {target} " in shown
