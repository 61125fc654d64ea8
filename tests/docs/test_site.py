"""The site's menu leads to existing pages, and the site builds where the packages of `docs` are installed."""

import re
import subprocess
import sys
from importlib.util import find_spec

import pytest
import yaml

from tests.docs.tables import ROOT

DOCS = ROOT / "docs"


class _Loader(yaml.SafeLoader):
    """Reads a tag of MkDocs, which names a function, as that name."""


_Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: suffix)
CONFIG = yaml.load((ROOT / "mkdocs.yml").read_text(), _Loader)


def pages_of(nav: list) -> list[str]:
    found = []
    for entry in nav:
        target = next(iter(entry.values())) if isinstance(entry, dict) else entry
        found += pages_of(target) if isinstance(target, list) else [target]
    return found


def test_the_menu_has_each_page_once():
    pages = pages_of(CONFIG["nav"])
    assert sorted(pages) == sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))


@pytest.mark.parametrize("path", sorted(DOCS.glob("*/**/*.md")), ids=lambda path: path.stem)
def test_prose_is_narrow(path):
    """Tables, code and lines with only a link may be wider."""
    in_code = False
    for number, line in enumerate(path.read_text().splitlines(), 1):
        in_code ^= line.startswith("```")
        if not in_code and not line.startswith(("|", "    ", "```")):
            assert len(line) <= 110, f"{path.name}:{number}"


def test_what_a_page_includes_is_there():
    """Ruff formats blocks marked `python`, and an include is not Python: such a block is marked `{ .python
    }`."""
    text = "".join(path.read_text() for path in DOCS.rglob("*.md"))
    included = re.findall(r'^--8<-- "(.+)"$', text, re.MULTILINE)
    assert len(included) == text.count("\n--8") >= 3
    assert all((ROOT / path).is_file() for path in included)


def test_the_site_builds(tmp_path):
    if not find_spec("mkdocs") or not find_spec("mkdocstrings_handlers"):
        pytest.skip("the packages of the extra `docs` are not installed")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", tmp_path],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr
    assert (tmp_path / "reference" / "client" / "index.html").read_text().count("AsyncClient") > 10
    assert "STATUS_CODES" in (tmp_path / "tutorial" / "web-app" / "index.html").read_text()
