"""Images from arrays of numpy's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...checks import check_choice, did_you_mean
from .array_files import check_array_file
from .image_data import ImageData, checked_contexts
from .value_range import described, parse_range, recognised_range, to_unit_range

LAYOUTS = ("auto", "NHWC", "NCHW")
MAX_CHANNELS = 4  # tells the channel axis from the others where the layout is not declared


def load_image_array(
    path: str | Path,
    labels: str | Path | None = None,
    layout: str = "auto",
    value_range: str = "auto",
) -> ImageData:
    """Images from an .npy array, or from `images` (and `labels`, where there) of an .npz.

    Args:
        path: array [N, S, S], [N, S, S, C] or [N, C, S, S] of numbers.
        labels: an .npy of int [N] labels, or [N, n_cfeat] contexts.
        layout: "NHWC", "NCHW", or "auto": whichever the shape allows, an error where it
            allows both.
        value_range: "LOW,HIGH", black and white; "auto": see `recognised_range`.

    Raises: FileNotFoundError; ValueError for what is not such an array, and where its values do not
    tell their range.
    """
    pixels, contexts = read_arrays(Path(path))
    if labels is not None:
        contexts = read_arrays(Path(labels), name="labels")[0]
    pixels = _to_nchw(pixels, layout)
    check_numbers(pixels)
    if contexts is not None:
        contexts = contexts_of_array(contexts, len(pixels))
    if not pixels.size:
        return ImageData(torch.from_numpy(pixels), contexts)  # its error
    limits = parse_range(value_range) or recognised_range(pixels)
    images = torch.from_numpy(to_unit_range(pixels, *limits))
    return ImageData(images, contexts, notes=(described(pixels, *limits),))


def check_numbers(array: np.ndarray, name: str = "data") -> None:
    """Raises: ValueError for what is not real numbers."""
    if array.dtype != np.bool_ and not np.issubdtype(array.dtype, np.number):
        raise ValueError(f"{name}: wanted numbers, got an array of {array.dtype}")
    if np.iscomplexobj(array):
        raise ValueError(f"{name}: wanted real numbers, got {array.dtype}")


def contexts_of_array(labels: np.ndarray, count: int) -> Tensor:
    """The contexts, float32 [count, n], of labels or vectors. Raises: ValueError."""
    check_numbers(labels, "labels")
    return checked_contexts(torch.from_numpy(labels), count, 0, "labels")


def read_arrays(
    path: Path, mmap: bool = False, name: str = "data"
) -> tuple[np.ndarray, np.ndarray | None]:
    """(images, labels or None) of an .npy, which is mapped where mmap, or an .npz. Errors call the
    file by `name`."""
    if not path.exists():
        raise FileNotFoundError(f"{name}: no file {path}")
    check_array_file(path, fits_in_memory=not mmap, name=name)
    try:
        loaded = np.load(path, mmap_mode="r" if mmap else None, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{name}: cannot read the array {path}: {error}") from error
    if isinstance(loaded, np.ndarray):
        return loaded, None
    with loaded:
        if "images" not in loaded:
            names = sorted(loaded.files)
            near = "".join(did_you_mean(one, ["images"]) for one in names)
            raise ValueError(f"{name}: wanted an array `images` in {path}, got {names}{near}")
        return loaded["images"], loaded.get("labels")


def _to_nchw(pixels: np.ndarray, layout: str) -> np.ndarray:
    found = find_layout(pixels.shape, layout)
    if pixels.ndim == 3:
        return pixels[:, None]
    return np.moveaxis(pixels, 3, 1) if found == "NHWC" else pixels


def find_layout(shape: tuple[int, ...], layout: str) -> str:
    """ "NHWC" or "NCHW", as it is declared, or, for "auto", as the shape of an array tells.

    Raises: ValueError where it does not tell, and for another number of axes.
    """
    check_choice("layout", layout, LAYOUTS)
    if len(shape) == 3:
        return "NCHW"
    if len(shape) != 4:
        raise ValueError(
            f"data: wanted an array [N, S, S], [N, S, S, C] or [N, C, S, S], got {shape}"
        )
    if layout != "auto":
        return layout
    _, first, second, third = shape
    possible = []
    if first == second and third <= MAX_CHANNELS:
        possible.append("NHWC")
    if second == third and first <= MAX_CHANNELS:
        possible.append("NCHW")
    if len(possible) != 1:
        raise ValueError(
            f"layout: wanted 'NHWC' or 'NCHW' for an array {shape}, whose sizes do not tell, got "
            "'auto'"
        )
    return possible[0]
