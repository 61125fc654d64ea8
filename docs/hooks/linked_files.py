"""MkDocs hook: replaces each link to a file outside docs/ by a link to a copy of that file."""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

LINK = re.compile(r"\]\((\.\./[^)#\s]+)(#[^)]*)?\)")


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite each such link, and add the file to the site. Returns the page's new Markdown."""
    docs = Path(config.docs_dir)
    here = posixpath.dirname(page.file.src_uri)

    def lead_to_copy(link: re.Match[str]) -> str:
        source = (docs / here / link[1]).resolve()
        if source.is_relative_to(docs):
            return link[0]
        if source.is_dir():
            source /= "README.md"
        # The suffix .txt makes a browser show any file, and keeps MkDocs from rendering it as a page.
        copy = f"source/{source.relative_to(docs.parent).as_posix()}.txt"
        if not files.get_file_from_path(copy):
            files.append(File.generated(config, copy, abs_src_path=str(source)))
        return f"]({posixpath.relpath(copy, here or '.')})"

    return LINK.sub(lead_to_copy, markdown)
