"""A hook of mkdocs: pages from outside of docs/, and a site that fetches nothing from anywhere.

On the repository's own pages a link to such a page stays what it is, `../CHANGELOG.md`; the site has that file as
changelog.md.
"""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from mkdocs.utils import get_relative_url

ROOT = Path(__file__).resolve().parent.parent
# File of the repository -> page of the site.
OUTSIDE = {"CHANGELOG.md": "changelog.md", "benchmarks/results/cpu.md": "measured.md"}
OF_FIGURES = ("performance.md", "measured.md", "optimizer.md")  # their tables scroll sideways and do not wrap
# The theme's remedy for search in file://, and the one that takes its place.
FETCHED = '<script src="https://unpkg.com/iframe-worker/shim"></script>'
OWN = "search-in-a-file.js"
ELSEWHERE = re.compile(r'<(?:script|img|iframe|source)\b[^>]*\bsrc="(?:https?:)?//|<link\b[^>]*\bhref="(?:https?:)?//')


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for source, page in OUTSIDE.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    for source, target in OUTSIDE.items():
        markdown = markdown.replace(f"](../{source})", f"]({target})")
    return markdown


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    return f'<div class="figures">{html}</div>' if page.file.src_uri in OF_FIGURES else html


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    output = output.replace(FETCHED, f'<script src="{get_relative_url(OWN, page.url)}"></script>')
    if found := ELSEWHERE.search(output):
        raise PluginError(f"{page.file.src_uri}: expected nothing that is fetched from elsewhere, got {found[0]}")
    return output
