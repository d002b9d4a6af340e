"""HTML pages that need nothing beside themselves: one look, in light and dark, wide and narrow."""

from __future__ import annotations

import base64
import html
import io
import webbrowser
from pathlib import Path

from PIL import Image

STYLE = """
  :root { color-scheme: light dark; --ink: #222; --paper: #fff; --soft: #666; --line: #ddd;
    --ours: #2a6fdb; --other: #b9c2cf; }
  @media (prefers-color-scheme: dark) { :root { --ink: #e6e6e6; --paper: #16181d; --soft: #a0a4ad;
    --line: #363a43; --ours: #6ea8ff; --other: #565d6b; } }
  body { font: 16px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 50em; padding: 0 1em;
    color: var(--ink); background: var(--paper); }
  table { border-collapse: collapse; width: 100%; }
  td, th { text-align: left; padding: .4em .6em; border-bottom: 1px solid var(--line); }
  .n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
  img { max-width: 100%; }
  pre { overflow-x: auto; padding: .8em 1em; border: 1px solid var(--line); border-radius: 6px; }
  small { color: var(--soft); }
  .wide { overflow-x: auto; margin: 1em 0; }
"""


def write_page(path: Path, title: str, body: str, style: str = "") -> None:
    """Args: title: plain text. body: HTML. style: CSS beside that of every page."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}{style}</style></head>\n"
        f"<body>\n<h1>{html.escape(title)}</h1>\n{body}\n</body></html>\n",
        encoding="utf-8",
    )


def embedded(picture: Image.Image) -> str:
    """A picture as the address of an <img>."""
    content = io.BytesIO()
    picture.save(content, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(content.getvalue()).decode()


def show(path: Path) -> None:
    """Opens a page in the browser; where there is none, says where the page is."""
    if not webbrowser.open(path.resolve().as_uri()):
        print(f"no browser  open {path} yourself")
