"""Sets of samples in files: any number of them, drawn by any number of processes, resumed."""

from __future__ import annotations

import hashlib
import io
import json
import os
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..sampling.pictures import to_levels
from ..training.checkpoints import write_whole
from ..training.data.array_files import check_array_file
from ..training.data.folders import image_files
from ..training.data.image_files import PictureReader

RECORD_NAME = "samples.json"
SHARD = "samples-{:09d}.npz"  # by the number of its first sample
PICTURE = "{:09d}.png"


@dataclass(frozen=True)
class SampleSet:
    """The files of a set, by parts of so many samples in a row.

    Sample i is of the chosen class i modulo their number.

    Args:
        path: the folder. classes: the names of the network's; () for none.
        pictures: a PNG for each sample, in a folder for each class; else an .npz for each part,
            with images uint8 [n, S, S, C], and labels and numbers, int64 [n].
        chosen: the numbers of the classes to draw; () for none.
    """

    path: Path
    classes: tuple[str, ...]
    pictures: bool
    chosen: tuple[int, ...]

    def begin(self, record: dict) -> None:
        """Makes the folder. record: what its samples come from, as JSON has it.

        Raises: ValueError where it has samples from something else, naming what differs.
        """
        names = [self.classes[i] for i in self.chosen] if self.pictures else []
        for name in names:
            if name in ("", ".", "..") or Path(name).name != name:
                raise ValueError(f"format: a class called {name!r} cannot be a folder; take npz")
        self.path.mkdir(parents=True, exist_ok=True)
        file = self.path / RECORD_NAME
        if file.exists():
            found = json.loads(file.read_text(encoding="utf-8"))
            for name in record.keys() | found.keys():
                if record.get(name) != found.get(name):
                    raise ValueError(
                        f"out: the samples in {self.path} are of another {name}: wanted "
                        f"{record.get(name)}, got {found.get(name)}; choose another folder"
                    )
        self._make_folders(names)
        write_whole(file, json.dumps(record, indent=2).encode())

    def _make_folders(self, names: list[str]) -> None:
        """One of each class, under its own name: Windows takes some names for others ("a." and "A"
        for "a"), and refuses some.

        Raises: ValueError.
        """
        for name in names:
            try:
                (self.path / name).mkdir(exist_ok=True)
            except OSError as error:
                raise ValueError(
                    f"format: a class called {name!r} cannot be a folder here ({error}); take npz"
                ) from error
        for name in set(names) - set(os.listdir(self.path)):
            raise ValueError(f"format: a class called {name!r} cannot be a folder here; take npz")

    def has(self, numbers: range) -> bool:
        """Whether a part is there, whole."""
        if self.pictures:
            return all(self._picture(i).exists() for i in numbers)
        try:
            with np.load(self.path / SHARD.format(numbers[0]), allow_pickle=False) as found:
                return len(found["numbers"]) >= len(numbers)
        except (OSError, KeyError, ValueError, zipfile.BadZipFile):  # none, or a damaged one
            return False

    def write(self, numbers: range, images: Tensor) -> None:
        """images: [n, C, S, S], clipped to [-1, 1]; each file whole or not at all."""
        pixels = to_levels(images)
        if not self.pictures:
            arrays = {"images": pixels, "numbers": np.array(numbers)}
            if self.chosen:
                arrays["labels"] = self.labels(numbers).numpy()
            content = io.BytesIO()
            np.savez_compressed(content, **arrays)
            write_whole(self.path / SHARD.format(numbers[0]), content.getvalue())
            return
        for number, image in zip(numbers, pixels, strict=True):
            content = io.BytesIO()
            Image.fromarray(image[..., 0] if image.shape[2] == 1 else image).save(content, "PNG")
            write_whole(self._picture(number), content.getvalue())

    def labels(self, numbers: range) -> Tensor | None:
        """int64 [n]: the classes of some samples."""
        if not self.chosen:
            return None
        return torch.tensor([self._class_of(number) for number in numbers])

    def _class_of(self, number: int) -> int:
        return self.chosen[number % len(self.chosen)]

    def _picture(self, number: int) -> Path:
        folder = self.path / self.classes[self._class_of(number)] if self.chosen else self.path
        return folder / PICTURE.format(number)


def read_samples(
    path: Path, shape: tuple[int, int, int], classes: tuple[str, ...]
) -> tuple[Tensor, Tensor | None]:
    """A folder of samples, of `SampleSet` or another's.

    Args: shape: (C, S, S) of an image. classes: their names, which sub-folders of pictures have.
    Returns: images float32 [N,C,S,S] in [-1, 1], labels int64 [N] or None.
    Raises: FileNotFoundError; ValueError for other images.
    """
    if not path.is_dir():
        raise FileNotFoundError(f"samples: no folder {path}")
    shards = sorted(path.glob(SHARD.format(0).replace("0" * 9, "*")))
    pixels, labels = _of_shards(shards) if shards else _of_pictures(path, shape, classes)
    found = (pixels.shape[3], *pixels.shape[1:3]) if pixels.ndim == 4 else pixels.shape
    if found != shape or pixels.dtype != np.uint8:
        raise ValueError(
            f"samples: wanted 8-bit images {list(shape)}, got {pixels.dtype} {list(found)}, {path}"
        )
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    return images, None if labels is None else torch.from_numpy(labels)


def _of_shards(files: list[Path]) -> tuple[np.ndarray, np.ndarray | None]:
    images, labels = [], []
    for file in files:
        check_array_file(file, fits_in_memory=True)
        with np.load(file, allow_pickle=False) as found:
            images.append(found["images"])
            labels.append(found.get("labels"))
    return np.concatenate(images), None if labels[0] is None else np.concatenate(labels)


def _of_pictures(
    path: Path, shape: tuple[int, int, int], classes: tuple[str, ...]
) -> tuple[np.ndarray, np.ndarray | None]:
    channels, side, _ = shape
    folders = [path / name for name in classes if (path / name).is_dir()]
    reader = PictureReader(side)
    found = [(file, folder.name) for folder in folders or [path] for file in image_files(folder)]
    if not found:
        raise ValueError(f"samples: no {SHARD.format(0)} and no pictures in {path}")
    pixels = np.stack([reader.read_one(file, channels) for file, _ in found])
    if not folders:
        return pixels, None
    return pixels, np.array([classes.index(name) for _, name in found])


def digest_of(file: Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(file, "rb") as opened:
        while block := opened.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
