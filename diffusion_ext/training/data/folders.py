"""Folders of pictures: listed once; held in memory where they are few, else read as needed."""

from __future__ import annotations

import csv
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ...checks import counted, did_you_mean
from .image_data import ImageData
from .image_files import PictureReader
from .lazy import LazyData

IN_MEMORY_BYTES = 2**30  # of float32 images; beyond, a folder is read as needed
LOOKED_AT = 64  # pictures that tell whether a folder is grey


def load_image_folder(
    folder: str | Path,
    size: int,
    value_range: str = "auto",
    background: str = "white",
    skip_unreadable: bool = False,
    labels: str | Path | None = None,
    lazy: bool | None = None,
    workers: int = 0,
) -> ImageData | LazyData:
    """Every image in a folder, cropped to its central square and resized to size x size.

    Sub-folders are classes, in alphabetical order; without any, the images have no context.
    The images become grey where all of them are (of a lazy folder: all of a few), RGB otherwise; of
    an animation it is the first frame.

    Args:
        value_range, background, skip_unreadable: see PictureReader.
        labels: a CSV with the columns `file`, relative to the folder, and `label`, in place of
            sub-folders. Only the files that it names are read.
        lazy: read the images when a batch wants them, in 8 bits a channel; None: where they would
            take more than 1 GiB.
        workers: processes that read a lazy folder ahead.

    Raises: ValueError for a folder without images, images beside class folders, a CSV that does not
    fit, or an image that cannot be read.
    """
    folder = Path(folder)
    files, classes, names = _by_csv(folder, Path(labels)) if labels else _by_folders(folder)
    reader = PictureReader(size, background, value_range, skip_unreadable)
    if lazy is None:
        lazy = len(files) * 3 * size * size * 4 > IN_MEMORY_BYTES
    if lazy:
        source = PictureFiles(files, classes, reader)
        return LazyData(source, names, workers, strict=not skip_unreadable, notes=source.notes)
    pixels, read = reader.read(files)
    place = {file: i for i, file in enumerate(files)}
    kept = np.array([place[file] for file in read], dtype=np.int64)
    found = set() if classes is None else set(classes[kept].tolist())
    for missing in set(range(len(names))) - found:
        lines = [f"data: no images in {folder / names[missing]}", *reader.notes]
        raise ValueError("\n".join(lines))
    if not len(read):
        raise ValueError("\n".join([f"data: no images in {folder}", *reader.notes]))
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    contexts = None if classes is None else torch.from_numpy(classes[kept])
    return ImageData(images, contexts, names, reader.notes, tuple(map(str, read)))


class PictureFiles:
    """Picture files as a source of LazyData.

    Args: classes: int64 [N], or None.
    """

    def __init__(self, files: Sequence[Path], classes: np.ndarray | None, reader: PictureReader):
        # A list of strings by one array: worker processes share its memory.
        self._files = np.array([os.fsencode(file) for file in files])
        self._classes, self._reader = classes, reader
        step = max(len(files) // LOOKED_AT, 1)
        channels = 3 if any(reader.is_colour(file) for file in files[::step]) else 1
        self.shape = (channels, reader.size, reader.size)
        kind = "grey" if channels == 1 else "RGB"
        self.notes = (f"{counted(len(files), 'file')}, read as needed, {kind}",)

    def __len__(self) -> int:
        return len(self._files)

    def identity(self) -> str:
        """A digest of the files, as they are now, of their classes and of how they are read."""
        digest = hashlib.sha256(f"{self.shape} {self._reader.background}".encode())
        digest.update(self._reader.value_range.encode())
        digest.update(b"" if self._classes is None else self._classes.tobytes())
        for file in self._files:
            status = os.stat(file.item())
            digest.update(file.item())
            digest.update(f" {status.st_size} {status.st_mtime_ns}\n".encode())
        return digest.hexdigest()

    def name_of(self, index: int) -> str:
        return os.fsdecode(self._files[index].item())

    def read(self, index: int) -> tuple[Tensor, int | None]:
        pixels = self._reader.read_one(Path(self.name_of(index)), self.shape[0])
        label = None if self._classes is None else int(self._classes[index])
        return torch.from_numpy(np.moveaxis(pixels, 2, 0).copy()), label


def _by_folders(folder: Path) -> tuple[list[Path], np.ndarray | None, tuple[str, ...]]:
    """(files, the class of each or None, the names of the classes)"""
    with os.scandir(folder) as entries:
        inside = sorted(entry.name for entry in entries if entry.is_dir())
    classes = [folder / name for name in inside if not name.startswith(".")]
    if classes and image_files(folder):
        raise ValueError(f"data: {folder} has images beside its class folders; move them into one")
    found = [image_files(place) for place in classes or [folder]]
    for place, files in zip(classes or [folder], found, strict=True):
        if not files:
            raise ValueError(f"data: no images in {place}")
    files = [file for of_class in found for file in of_class]
    if not classes:
        return files, None, ()
    labels = np.repeat(np.arange(len(classes)), [len(of_class) for of_class in found])
    return files, labels, tuple(place.name for place in classes)


def _by_csv(folder: Path, path: Path) -> tuple[list[Path], np.ndarray, tuple[str, ...]]:
    if not path.is_file():
        raise FileNotFoundError(f"labels: no file {path}")
    with open(path, newline="", encoding="utf-8-sig") as file:
        rows = csv.DictReader(file)
        columns = sorted(rows.fieldnames or ())
        if missing := sorted({"file", "label"} - set(columns)):
            near = "".join(did_you_mean(column, missing) for column in columns)
            raise ValueError(f"labels: wanted columns file and label, got {columns}{near}")
        pairs = [(row["file"], row["label"]) for row in rows]
    if not pairs:
        raise ValueError(f"labels: no rows in {path}")
    names = sorted({label for _, label in pairs})
    index = {name: i for i, name in enumerate(names)}
    files = [folder / file for file, _ in pairs]
    for file in files[:1]:  # the rest shows when it is read
        if not file.is_file():
            raise ValueError(f"labels: {path} names {file}, which is not there")
    return files, np.array([index[label] for _, label in pairs]), tuple(names)


def image_files(folder: Path) -> list[Path]:
    """Those that Pillow may open, by their names, in order."""
    suffixes = tuple(Image.registered_extensions())
    with os.scandir(folder) as entries:
        names = [e.name for e in entries if e.name.lower().endswith(suffixes) and e.is_file()]
    return [folder / name for name in sorted(names)]
