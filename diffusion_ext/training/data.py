"""Training data: square images in [-1, 1], held in memory, with a context vector for each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from .image_files import PictureReader
from .value_range import described, parse_range, recognised_range, to_unit_range

LAYOUTS = ("auto", "NHWC", "NCHW")
MAX_CHANNELS = 4  # tells the channel axis from the others where the layout is not declared


@dataclass(eq=False)
class ImageData:
    """Images and their contexts.

    Args:
        images: float [N, C, S, S] in [-1, 1].
        contexts: int [N] class labels (made one-hot), or float [N, n_cfeat]; None for images
            without context, which get zeros [N, 1].
        class_names: a name for each label or context feature; default their numbers, or none
            where there is no context.
        notes: lines for people to read, of what the files were taken for.

    Raises:
        ValueError: naming the argument that does not fit.
    """

    images: Tensor
    contexts: Tensor | None = None
    class_names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.images = _checked_images(self.images)
        if self.contexts is None:
            self.contexts, self.class_names = torch.zeros(len(self.images), 1), ()
            return
        self.contexts = _checked_contexts(self.contexts, len(self.images), len(self.class_names))
        if not self.class_names:
            self.class_names = tuple(str(i) for i in range(self.contexts.shape[1]))
        if len(self.class_names) != self.contexts.shape[1]:
            raise ValueError(
                f"class_names: wanted {self.contexts.shape[1]} names, one for each context "
                f"feature, got {len(self.class_names)}"
            )

    def __len__(self) -> int:
        return len(self.images)


def load_data(
    source: str | Path,
    size: int = 32,
    labels: str | Path | None = None,
    layout: str = "auto",
    value_range: str = "auto",
    background: str = "white",
    skip_unreadable: bool = False,
) -> ImageData:
    """Loads "digits", a folder of images or an .npy/.npz array, whichever `source` names.

    Args: size, background and skip_unreadable are for a folder, labels and layout for an array; see
        the functions below.

    Raises: FileNotFoundError, ValueError.
    """
    path = Path(source)
    if str(source) == "digits":
        return load_digits()
    if path.is_dir():
        return load_image_folder(path, size, value_range, background, skip_unreadable)
    if path.suffix in (".npy", ".npz"):
        return load_image_array(path, labels, layout, value_range)
    if not path.exists():
        raise FileNotFoundError(f"data: no file or folder {path}")
    raise ValueError(f'data: wanted "digits", a folder, .npy or .npz, got {path}')


def load_digits() -> ImageData:
    """The 1797 real handwritten digits that come with scikit-learn: [1797, 1, 8, 8], 10 classes."""
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ImportError(
            "the digits come with scikit-learn: pip install 'diffusion_ext[demo]'"
        ) from error
    pixels, labels = datasets.load_digits(return_X_y=True)  # [1797, 64] in 0..16, [1797]
    images = torch.from_numpy(pixels).float().reshape(-1, 1, 8, 8) / 8 - 1
    return ImageData(images, torch.from_numpy(labels))


def load_image_folder(
    folder: str | Path,
    size: int,
    value_range: str = "auto",
    background: str = "white",
    skip_unreadable: bool = False,
) -> ImageData:
    """Every image in a folder, cropped to its central square and resized to size x size.

    Sub-folders are classes, in alphabetical order; without any, the images have no context.
    The images become grey where all of them are, RGB otherwise; of an animation it is the first
    frame.

    Args: value_range, background and skip_unreadable: see PictureReader.

    Raises: ValueError for a folder without images, images beside class folders, or an image
    that cannot be read.
    """
    folder = Path(folder)
    classes = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    if classes and _image_files(folder):
        raise ValueError(f"data: {folder} has images beside its class folders; move them into one")
    reader = PictureReader(size, background, value_range, skip_unreadable)
    places = classes or [folder]
    pixels, read = reader.read([file for place in places for file in _image_files(place)])
    counts = [sum(file.parent == place for file in read) for place in places]
    for place, count in zip(places, counts, strict=True):
        if not count:
            raise ValueError("\n".join([f"data: no images in {place}", *reader.notes]))
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    if not classes:
        return ImageData(images, notes=reader.notes)
    labels = torch.arange(len(classes)).repeat_interleave(torch.tensor(counts))
    return ImageData(images, labels, tuple(c.name for c in classes), reader.notes)


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
    pixels, contexts = _read_arrays(Path(path))
    if labels is not None:
        contexts = _read_arrays(Path(labels))[0]
    pixels = _to_nchw(pixels, layout)
    if pixels.dtype != np.bool_ and not np.issubdtype(pixels.dtype, np.number):
        raise ValueError(f"data: wanted numbers, got an array of {pixels.dtype}")
    if np.iscomplexobj(pixels):
        raise ValueError(f"data: wanted real numbers, got {pixels.dtype}")
    if contexts is not None:
        contexts = _checked_contexts(torch.from_numpy(contexts), len(pixels), 0)
    if not pixels.size:
        return ImageData(torch.from_numpy(pixels), contexts)  # its error
    limits = parse_range(value_range) or recognised_range(pixels)
    images = torch.from_numpy(to_unit_range(pixels, *limits))
    return ImageData(images, contexts, notes=(described(pixels, *limits),))


def _checked_images(images: Tensor) -> Tensor:
    if images.ndim != 4 or images.shape[2] != images.shape[3]:
        raise ValueError(f"images: wanted shape [N, C, S, S], got {list(images.shape)}")
    if not images.numel():
        raise ValueError(f"images: wanted at least one image, got shape {list(images.shape)}")
    low, high = images.min().item(), images.max().item()
    if not (low >= -1 and high <= 1):  # NaN fails this too
        raise ValueError(f"images: wanted values in [-1, 1], got {low:g} to {high:g}")
    return images.float()


def _checked_contexts(contexts: Tensor, count: int, classes: int) -> Tensor:
    if contexts.ndim not in (1, 2) or len(contexts) != count:
        raise ValueError(
            f"contexts: wanted labels [{count}] or vectors [{count}, n_cfeat], "
            f"got shape {list(contexts.shape)}"
        )
    if contexts.ndim == 2:
        return contexts.float()
    if contexts.is_floating_point() or contexts.min() < 0:
        raise ValueError(f"contexts: wanted labels 0, 1, ..., got {contexts.dtype} {contexts[:5]}")
    return F.one_hot(contexts.long(), max(classes, int(contexts.max()) + 1)).float()


def _image_files(folder: Path) -> list[Path]:
    suffixes = Image.registered_extensions()
    return sorted(p for p in folder.iterdir() if p.is_file() and p.suffix.lower() in suffixes)


def _read_arrays(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    if not path.exists():
        raise FileNotFoundError(f"data: no file {path}")
    try:
        loaded = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"data: cannot read the array {path}: {error}") from error
    if isinstance(loaded, np.ndarray):
        return loaded, None
    with loaded:
        if "images" not in loaded:
            raise ValueError(f"data: wanted an array `images` in {path}, got {loaded.files}")
        return loaded["images"], loaded.get("labels")


def _to_nchw(pixels: np.ndarray, layout: str) -> np.ndarray:
    if layout not in LAYOUTS:
        raise ValueError(f"layout: wanted one of {LAYOUTS}, got {layout!r}")
    if pixels.ndim == 3:
        return pixels[:, None]
    if pixels.ndim != 4:
        raise ValueError(
            f"data: wanted an array [N, S, S], [N, S, S, C] or [N, C, S, S], got {pixels.shape}"
        )
    _, first, second, third = pixels.shape
    possible = []
    if first == second and third <= MAX_CHANNELS:
        possible.append("NHWC")
    if second == third and first <= MAX_CHANNELS:
        possible.append("NCHW")
    if layout == "auto" and len(possible) != 1:
        raise ValueError(f"data: the shape {pixels.shape} does not tell its layout; declare it")
    nhwc = "NHWC" in (layout, *possible) and layout != "NCHW"
    return np.moveaxis(pixels, 3, 1) if nhwc else pixels
