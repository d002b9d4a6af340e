"""The page of `demo`: the denoising to play with, what came out, and what to try next."""

from __future__ import annotations

import html
from collections.abc import Mapping
from pathlib import Path

from PIL import Image

from . import player
from .page import embedded, write_page

NEXT = """diffusion-ext sample {run} --sampler dpmpp_2m --steps 10 --open
diffusion-ext train --data photos/ --size 32
diffusion-ext bench stable-diffusion --open"""


def write_demo(path: Path, played: str, facts: Mapping[str, str], curve: Path) -> None:
    """Args: played: the player's HTML. facts: by their names. curve: a picture that may not be."""
    rows = "".join(
        f"<tr><th>{name}</th><td>{html.escape(f)}</td></tr>\n" for name, f in facts.items()
    )
    shown = ""
    if curve.is_file():
        with Image.open(curve) as picture:
            shown = (
                f'<h2>Training</h2><img alt="the loss of each epoch" src="{embedded(picture)}">\n'
            )
    commands = html.escape(NEXT.format(run=path.parent))
    body = (
        "<p>A small UNet was trained on 1,797 handwritten digits, and then asked for each digit in "
        "turn. Each sample starts as noise; drag the slider to see it lose that.</p>\n"
        f"{played}\n<table>{rows}</table>\n{shown}<h2>Next</h2>\n<pre>{commands}</pre>"
    )
    write_page(path, "Digits out of noise", body, player.STYLE)
