"""Data by one name and a few options, as the command line has them."""

from __future__ import annotations

from pathlib import Path

from ...checks import check_at_least_1, did_you_mean
from .arrays import load_image_array
from .digits import load_digits
from .emoji import load_emoji
from .folders import load_image_folder
from .image_data import ImageData
from .lazy import LazyData
from .mapped import cached, map_image_array

EMOJI_SIZE, FOLDER_SIZE = 16, 32
ARRAYS = (".npy", ".npz")
NAMED = ("digits", "emoji")


def load_data(
    source: str | Path,
    size: int | None = None,
    labels: str | Path | None = None,
    layout: str = "auto",
    value_range: str = "auto",
    background: str = "white",
    skip_unreadable: bool = False,
    lazy: bool | None = None,
    workers: int = 0,
    cache: str | Path | None = None,
) -> ImageData | LazyData:
    """Loads "digits", "emoji", a folder of images or an .npy/.npz, whichever `source` names.

    Args: size, a multiple of 4, is for emoji (default 16) and a folder (default 32); background and
        skip_unreadable for a folder, layout for an array; see the functions below.
        labels: of an array an .npy; of a folder a CSV.
        lazy: read the images as they are needed; None: of a folder, where it is large.
        workers: processes that read ahead, where lazy.
        cache: an .npy file for the decoded images of a folder, which is then lazy; see `cached`.

    Raises: FileNotFoundError, ValueError; ImportError where the set's package is missing.
    """
    if size is not None:
        _check_size(size)
    path = Path(source)
    if str(source) == "digits":
        return load_digits()
    if str(source) == "emoji":
        return load_emoji(size or EMOJI_SIZE)
    if not path.exists():
        near = did_you_mean(
            path.name, {**_files_beside(path), "digits": "digits", "emoji": "emoji"}
        )
        raise FileNotFoundError(
            f"data: no file or folder {path}; wanted digits, emoji, a folder, .npy or .npz{near}"
        )
    if path.is_dir():
        folder = (path, size or FOLDER_SIZE, value_range, background, skip_unreadable, labels)
        if cache is None:
            return load_image_folder(*folder, lazy, workers)
        return cached(load_image_folder(*folder, True, workers), cache)
    if path.suffix == ".npy" and lazy:
        return map_image_array(path, labels, layout, value_range, workers)
    if path.suffix in ARRAYS:
        return load_image_array(path, labels, layout, value_range)
    raise ValueError(f'data: wanted "digits", "emoji", a folder, .npy or .npz, got {path}')


def _files_beside(path: Path) -> dict[str, str | Path]:
    """Folders and arrays by their names; none where the path's own folder is missing."""
    beside = path.parent.iterdir() if path.parent.is_dir() else ()
    return {file.name: file for file in beside if file.is_dir() or file.suffix in ARRAYS}


def _check_size(size) -> None:
    """size is one that a network can halve twice, before it is made for the images."""
    check_at_least_1("size", size)
    if size % 4:
        raise ValueError(f"size: wanted a multiple of 4, got {size}")
