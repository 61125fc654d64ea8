"""A hook of MkDocs: a link out of docs/, to a script or a figure, leads to a copy of that file."""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

LINK = re.compile(r"\]\((\.\./[^)#\s]+)(#[^)]*)?\)")


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrites each such link, and adds the file that it names to those of the site."""
    docs = Path(config.docs_dir)
    here = posixpath.dirname(page.file.src_uri)

    def lead_to_copy(link: re.Match[str]) -> str:
        source = (docs / here / link[1]).resolve()
        if source.is_relative_to(docs):
            return link[0]
        if source.is_dir():
            source /= "README.md"
        # Named .txt, so that a browser shows it whatever it is, and MkDocs makes no page of it.
        copy = f"source/{source.relative_to(docs.parent).as_posix()}.txt"
        if not files.get_file_from_path(copy):
            files.append(File.generated(config, copy, abs_src_path=str(source)))
        return f"]({posixpath.relpath(copy, here or '.')})"

    return LINK.sub(lead_to_copy, markdown)
