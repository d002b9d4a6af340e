"""Picture files as square arrays: each mode of Pillow's gives its right values, or an error."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageColor, ImageOps
from tqdm import tqdm

from ...checks import counted
from .value_range import described, parse_range, recognised_range, to_unit_range

GREY = ("1", "L", "LA", "La")
NUMBERS = ("I", "F")  # modes of numbers, and "I;16" in either byte order
SIXTEEN_BITS = (0, 65535)
SCALED_BY_PILLOW = ("PNG", "PPM")  # formats whose mode "I" is of 16 bits too


def _opened(file: Path) -> Image.Image:
    """A picture, not read yet. Raises: what Pillow raises, also for one whose size it warns of:
    PIL.Image.MAX_IMAGE_PIXELS is the limit."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        return Image.open(file)


@dataclass
class PictureReader:
    """Reads pictures, cropped to their central square and resized, and notes what is not usual.

    Args:
        size: side of the squares.
        background: a colour that transparent pixels are laid over, as Pillow names or writes it.
        value_range: black and white of pictures of numbers (16 bits, modes I and F), see
            `parse_range`; 8 bits are always 0 to 255.
        skip_unreadable: leave such files out, rather than raise.

    Raises: ValueError for another background or value_range.
    """

    size: int
    background: str = "white"
    value_range: str = "auto"
    skip_unreadable: bool = False
    animated: list[Path] = field(default_factory=list, init=False)
    unreadable: list[str] = field(default_factory=list, init=False)
    taken: str = field(default="", init=False)

    def __post_init__(self) -> None:
        self._range = parse_range(self.value_range)
        try:
            self._colour = ImageColor.getrgb(self.background)[:3]
        except ValueError as error:
            raise ValueError(f"background: wanted a colour, got {self.background!r}") from error

    def read(self, files: list[Path]) -> tuple[np.ndarray, list[Path]]:
        """float32 [N, size, size, 1 or 3] in [-1, 1], grey where all are, and the files read.

        Raises: ValueError naming a file that cannot be read, or whose mode is not known.
        """
        bar = tqdm(files, "reading", unit="file", leave=False, delay=1, disable=None)
        pictures = {file: self._read(file) for file in bar}
        pictures = {file: picture for file, picture in pictures.items() if picture is not None}
        numbers = [pixels for pixels, known in pictures.values() if known is None]
        if numbers:
            values = np.stack(numbers)
            recognised = self._range or recognised_range(values)
            self.taken = described(values, *recognised)
        colour = any(pixels.ndim == 3 for pixels, _ in pictures.values())
        images = []
        for file, (pixels, known) in pictures.items():
            try:
                unit = np.atleast_3d(to_unit_range(pixels, *(known or recognised)))
            except ValueError as error:
                raise ValueError(f"data: {file}: {error}") from error
            images.append(np.broadcast_to(unit, (*unit.shape[:2], 3 if colour else 1)))
        return np.stack(images) if images else np.empty((0,)), list(pictures)

    def is_colour(self, file: Path) -> bool:
        """Whether it has a colour; a file that cannot be read has none."""
        try:
            with _opened(file) as picture:
                return self._square(picture)[0].ndim == 3
        except Exception:  # reading it later says why
            return False

    def read_one(self, file: Path, channels: int) -> np.ndarray:
        """uint8 [size, size, channels] of a file: grey for one channel, else RGB.

        Raises: ValueError naming the file where it cannot be read, and for one of numbers whose
        range is not known.
        """
        try:
            with _opened(file) as picture:
                return self.pixels_of(picture, channels)
        except Exception as error:  # decoders raise whatever a broken file makes them stumble over
            raise ValueError(f"cannot read the image {file}: {error}") from error

    def pixels_of(self, picture: Image.Image, channels: int | None = None) -> np.ndarray:
        """uint8 [size, size, channels] of a picture; channels: None is 1 where it is grey, else 3.

        Raises: ValueError for a picture of numbers whose range is not known.
        """
        pixels, known = self._square(picture)
        if known is None and self._range is None:
            raise ValueError('its numbers do not tell their range: say it by "LOW,HIGH"')
        if known != (0, 255):
            unit = to_unit_range(pixels, *(known or self._range))
            pixels = ((unit + 1) * 127.5).round().astype(np.uint8)
        if pixels.ndim == 3 and channels == 1:
            pixels = np.asarray(Image.fromarray(pixels).convert("L"))
        pixels = np.atleast_3d(pixels)
        return pixels if channels is None else pixels.repeat(channels // pixels.shape[2], 2)

    @property
    def notes(self) -> tuple[str, ...]:
        """Lines for people to read, of what was found."""
        lines = [self.taken] if self.taken else []
        if self.animated:
            count, first = len(self.animated), self.animated[0].name
            files = counted(count, "file of several frames")
            lines.append(f"{files} ({first}{', ...' * (count > 1)}), the first frame is taken")
        if self.unreadable:
            lines.append(f"{counted(len(self.unreadable), 'file')} left out, which cannot be read:")
            lines += [f"  {why}" for why in self.unreadable]
        return tuple(lines)

    def _read(self, file: Path):
        """(pixels [S, S] or [S, S, 3], their range, or None where others tell it), or None."""
        try:
            with _opened(file) as picture:
                if getattr(picture, "n_frames", 1) > 1:
                    self.animated.append(file)
                return self._square(picture)
        except Exception as error:  # decoders raise whatever a broken file makes them stumble over
            if not self.skip_unreadable:
                raise ValueError(f"data: cannot read the image {file}: {error}") from error
            self.unreadable.append(f"{file}: {error}")
            return None

    def _square(self, picture: Image.Image):
        kind, mode = picture.format, picture.mode
        upright = ImageOps.exif_transpose(picture)
        if not mode.startswith("I;16") and mode not in NUMBERS:
            flat = self._flattened(upright)
            return np.asarray(self._fit(flat)), (0, 255)
        values = np.asarray(upright).astype(np.float32)
        known = mode.startswith("I;16") or (mode == "I" and kind in SCALED_BY_PILLOW)
        square = np.asarray(self._fit(Image.fromarray(values)))
        square = square.clip(values.min(), values.max())  # the filter swings beyond them
        square = square.round().astype(np.int32) if mode == "I" else square
        return square, (self._range or SIXTEEN_BITS) if known else None

    def _fit(self, picture: Image.Image) -> Image.Image:
        return ImageOps.fit(picture, (self.size, self.size), Image.Resampling.LANCZOS)

    def _flattened(self, picture: Image.Image) -> Image.Image:
        """picture in mode L or RGB, without transparency."""
        grey = picture.mode in GREY
        try:
            if picture.has_transparency_data:
                over = Image.new("RGBA", picture.size, self._colour)
                over.alpha_composite(picture.convert("RGBA"))
                grey = grey and len(set(self._colour)) == 1
                picture = over
            return picture.convert("L" if grey else "RGB")
        except ValueError as error:
            raise ValueError(f"its mode {picture.mode} is not known ({error})") from error
