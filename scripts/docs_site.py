"""Hooks of mkdocs: READMEs, result pages and examples become pages, links between files become links between pages, nothing
comes from elsewhere.

Pages are written for reading in the repository. The site has them at other places, so a relative link is resolved in the
repository and replaced by the way to the page of that file; a link to a file that has no page fails the build.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
# file of the repository -> place in the site
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
    "benchmarks/README.md": "benchmarks/index.md",
    "csrc/README.md": "csrc/index.md",
    "examples/README.md": "examples/index.md",
}
PAGES |= {
    f"benchmarks/results/{file.name}": f"benchmarks/results/{file.name}"
    for file in ROOT.glob("benchmarks/results/*.md")
}
PAGES |= {f"examples/{file.name}": f"examples/{file.stem}.md" for file in ROOT.glob("examples/*.py")}
IMAGES = "benchmarks/results/*.png"
_LINK = re.compile(r"(?<=\]\()([^)#\s]+)(#[^)\s]*)?(?=\))")
_LOADED = re.compile(
    r"""<(?:script|link|img|iframe|source|video)\b[^>]*?\b(?:src|href)=["']?(?:https?:)?//[^"'\s>]+[^>]*>"""
)
_IN_STYLES = re.compile(r"""(?:url\(\s*["']?|@import\s+["'])(?:https?:)?//[^"')\s]+""")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages and images that lie outside docs/."""
    for source, place in PAGES.items():
        files.append(File.generated(config, place, content=_page(source)))
    for image in sorted(ROOT.glob(IMAGES)):
        place = image.relative_to(ROOT).as_posix()
        files.append(File.generated(config, place, abs_src_path=str(image)))
    return files


def _page(source: str) -> str:
    """A file of the repository as Markdown; a script as a block of code under its name."""
    text = (ROOT / source).read_text(encoding="utf-8")
    return f"# {source}\n\n```python\n{text}```\n" if source.endswith(".py") else text


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Turn links to files of the repository into links to their pages. Raises `PluginError` where there is none."""
    here = page.file.src_uri
    source = next((name for name, place in PAGES.items() if place == here), f"docs/{here}")

    if source.endswith(".py"):
        return markdown

    def replaced(match: re.Match[str]) -> str:
        target, anchor = match.group(1), match.group(2) or ""
        if ":" in target:
            return match.group(0)
        name = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        place = PAGES.get(name, name.removeprefix("docs/"))
        if files.get_file_from_path(place) is None:
            raise PluginError(f"{source} links to {target}, which is no page of the site: add it to {__file__}")
        return posixpath.relpath(place, posixpath.dirname(here) or ".") + anchor

    return _LINK.sub(replaced, markdown)


def on_post_build(config: Any) -> None:
    """Raises `PluginError` where a page or style would load something from another host."""
    for file in sorted(Path(config["site_dir"]).rglob("*")):
        if file.suffix in {".html", ".css"}:
            pattern = _LOADED if file.suffix == ".html" else _IN_STYLES
            found = pattern.search(file.read_text(encoding="utf-8"))
            if found is not None:
                raise PluginError(
                    f"{file.relative_to(config['site_dir'])} loads from elsewhere: {found.group(0)[:200]}"
                )
