"""Every relative link in a document leads to a file that is there, and to a heading that the file has."""

import re
import unicodedata
from collections import Counter
from pathlib import Path

import pytest

from tests.docs.tables import ROOT

DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")])
LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)")
CODE = re.compile(r"^```.*?^```|^    .*?$|`[^`\n]*`", re.MULTILINE | re.DOTALL)
HEADING = re.compile(r"^#{1,6} (.+)$", re.MULTILINE)


def links_in(path: Path) -> list[tuple[str, str]]:
    """The file and the heading that each link names; either may be empty."""
    return LINK.findall(CODE.sub("", path.read_text()))


def anchors_in(path: Path) -> set[str]:
    """The anchors of a document's headings, as MkDocs and GitHub make them."""
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    seen: Counter[str] = Counter()
    found = set()
    for heading in HEADING.findall(text):
        slug = slug_of(heading)
        found.add(f"{slug}_{seen[slug]}" if seen[slug] else slug)
        seen[slug] += 1
    return found


def slug_of(heading: str) -> str:
    words = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
    kept = unicodedata.normalize("NFKD", words).encode("ascii", "ignore").decode()
    return re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", kept).strip().lower())


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(path):
    missing = [link for link, _ in links_in(path) if not (path.parent / link).exists()]
    assert not missing


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_name_headings_that_are_there(path):
    missing = []
    for link, anchor in links_in(path):
        target = path.parent / link if link else path
        if anchor and target.suffix == ".md" and target.exists() and anchor not in anchors_in(target):
            missing.append(f"{link}#{anchor}")
    assert not missing


def test_there_are_links_to_check():
    links = [link for path in DOCUMENTS for link in links_in(path)]
    assert len(links) > 60
    assert sum(bool(anchor) for _, anchor in links) > 10


def test_an_anchor_is_made_of_a_heading_as_on_the_site():
    assert slug_of("The server's configuration") == "the-servers-configuration"
    assert slug_of("`INGINE_X`, and [a link](x.md)") == "ingine_x-and-a-link"
