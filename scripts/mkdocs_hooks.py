"""What the site needs besides docs/: pages and files of the repository that pages link to.

A link such as ``../benchmarks/results/embed.json`` or ``../CONTRIBUTING.md`` works on a code host. For the site the file is
copied to the same place below the site, a page is rendered there, and the link is written to fit.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
PAGES = ("CHANGELOG.md", "CONTRIBUTING.md")
LINK = re.compile(r"(\]\(|(?:src|href|srcset)=\")([^)\s\"#]+)")
FENCED = re.compile(r"(^```.*?^```[^\n]*$)", re.DOTALL | re.MULTILINE)


def place(link: str, folder: str) -> str | None:
    """Give what a page in a folder of the repository links to; None outside of the repository."""
    path = posixpath.normpath(posixpath.join(folder, link))
    return None if path.startswith("..") or "://" in link else path


def in_site(path: str) -> str:
    """Give the place below docs/ of a file of the repository."""
    if path in {"README.md", "."}:
        return "README.md"
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    page = ROOT / path / "README.md"
    return posixpath.join(path, "README.md") if page.is_file() else path


def on_files(files: Files, config: Any) -> Files:
    """Add the pages of the root, and the files that pages link to, as far as links lead."""
    waiting = [(file.abs_src_path, "docs/" + file.src_uri) for file in files.documentation_pages()]
    for name in PAGES:
        files.append(_file(name, config))
        waiting.append((str(ROOT / name), name))
    while waiting:
        source, path = waiting.pop()
        for link in links(Path(source).read_text(encoding="utf-8")):
            target = place(link, posixpath.dirname(path))
            if target is None or target.startswith("docs/") or target == "README.md":
                continue
            uri = in_site(target)
            found = ROOT / uri
            if found.is_file() and files.get_file_from_path(uri) is None:
                files.append(_file(uri, config))
                if found.suffix == ".md":
                    waiting.append((str(found), uri))
    return files


def on_page_markdown(markdown: str, page: Page, config: Any, files: Files) -> str:
    """Write links to fit the places in the site."""
    uri = page.file.src_uri
    path = uri if _is_outside(page.file, config) else f"docs/{uri}"

    def rewrite(match: re.Match[str]) -> str:
        target = place(match[2], posixpath.dirname(path))
        if target is None or not (ROOT / target).exists():
            return match[0]
        to = in_site(target)
        if files.get_file_from_path(to) is None:
            return match[0]
        return match[1] + posixpath.relpath(to, posixpath.dirname(uri) or ".")

    parts = FENCED.split(markdown)
    return "".join(part if i % 2 else LINK.sub(rewrite, part) for i, part in enumerate(parts))


def links(text: str) -> list[str]:
    """List the targets of a page's links."""
    return [link for _, link in LINK.findall(FENCED.sub("", text))]


def _is_outside(file: File, config: Any) -> bool:
    return not Path(str(file.abs_src_path)).is_relative_to(config["docs_dir"])


def _file(uri: str, config: Any) -> File:
    return File.generated(config, uri, abs_src_path=str(ROOT / uri))
