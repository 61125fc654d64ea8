"""A hook of MkDocs: build/package has ingine as it is installed, for mkdocstrings to read.

worker/ and producer/ lie beside ingine/ here, where a reader of sources finds no `ingine.producer`.
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
