"""What mkdocs does beside its plugins: the home page and the changelog are the project's own files,
links that leave docs/ lead to copies of what they name, and the benchmarks get their plots."""

from __future__ import annotations

import pathlib
import posixpath
import re
import sys

import plotly
from mkdocs.structure.files import File

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGES = {"index.md": "README.md", "changelog.md": "CHANGELOG.md"}  # page -> the file it shows
LINK = re.compile(r"(\]\()([^)#\s:]+)((?:#[^)\s]*)?\))")

sys.path.insert(0, str(ROOT))


def on_files(files, config):
    """Adds the pages that are made here, and the files outside docs/ that pages name."""
    for page, source in PAGES.items():
        text = _inside_docs((ROOT / source).read_text())
        files.append(File.generated(config, page, content=text))
    files.append(File.generated(config, "plots.md", content=_plots()))
    script = pathlib.Path(plotly.__file__).parent / "package_data" / "plotly.min.js"
    files.append(File.generated(config, "assets/plotly.min.js", abs_src_path=str(script)))
    for page in [file for file in files if file.src_uri.endswith(".md")]:
        for target in LINK.findall(page.content_string):
            named = _outside(page.src_uri, target[1])
            if named and _copy_of(named) not in files.src_uris:
                files.append(File.generated(config, _copy_of(named), **_contents(ROOT / named)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Links out of docs/ lead to the copies."""

    def copied(match):
        named = _outside(page.file.src_uri, match[2])
        if named is None:
            return match[0]
        here = posixpath.dirname(page.file.src_uri)
        return f"{match[1]}{posixpath.relpath(_copy_of(named), here)}{match[3]}"

    return LINK.sub(copied, markdown)


def _inside_docs(text: str) -> str:
    """A file of the project's root as a page of docs/: its links are from there."""

    def moved(match):
        target = match[2]
        inside = target.removeprefix("docs/") if target.startswith("docs/") else f"../{target}"
        names = {f"../{source}": page for page, source in PAGES.items()}
        return f"{match[1]}{names.get(inside, inside)}{match[3]}"

    return LINK.sub(moved, text)


def _outside(page: str, target: str) -> str | None:
    """What a link names in the project's tree, where that is outside docs/."""
    path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), target))
    return path if not path.startswith("docs/") and (ROOT / path).exists() else None


def _contents(path: pathlib.Path) -> dict:
    """A file's, or the names in a folder."""
    if path.is_file():
        return {"abs_src_path": str(path)}
    names = sorted(f"{p.name}/" if p.is_dir() else p.name for p in path.iterdir())
    return {"content": "".join(f"{n}\n" for n in names if not n.startswith(("_", ".")))}


def _copy_of(path: str) -> str:
    """Where a page finds it: pictures as they are, all else as text that browsers show."""
    return f"tree/{path}" if path.endswith((".png", ".gif")) else f"tree/{path}.txt"


def _plots() -> str:
    from benchmarks.interactive import page

    return page()
