"""MkDocs hook: links the package in build/package as it is installed, for mkdocstrings to read.

In the repository worker/ and producer/ are beside ingine/, where mkdocstrings finds no `ingine.producer`.
"""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "build" / "package" / "ingine"


def on_startup(**_: object) -> None:
    PACKAGE.mkdir(parents=True, exist_ok=True)
    for source in [*(ROOT / "ingine").iterdir(), ROOT / "producer", ROOT / "worker"]:
        link = PACKAGE / source.name
        if not link.is_symlink():
            link.symlink_to(source)
