"""The options of the data that a run is trained on, and how config.json has them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ..training import ImageData, LazyData, load_data
from ..training.run_folder import CONFIG_NAME


@dataclass(frozen=True)
class DataOptions:
    """Which images, and how they are read."""

    data: str = "digits"
    """"digits" (scikit-learn's), "emoji" (OpenMoji's), a folder of images (a sub-folder is a
    class), an .npy or .npz"""
    size: int | None = None
    """side of the images, a multiple of 4; default 16 for emoji, 32 for a folder's"""
    labels: Path | None = None
    """of an .npy of images: an .npy of labels or context vectors; of a folder: a CSV with the
    columns file and label"""
    layout: Literal["auto", "NHWC", "NCHW"] = "auto"
    """the order of an array's axes"""
    value_range: Annotated[str, tyro.conf.arg(name="range")] = "auto"
    """black and white of an array's numbers, or of pictures of numbers (16 bits, floats): "0,1",
    "-1,1", "0,255" or any "LOW,HIGH"; auto takes what the values tell, and says so"""
    background: str = "white"
    """colour that a folder's transparent pixels are laid over"""
    strict: bool = False
    """a file of a folder that cannot be read is an error; else it is left out and named"""
    lazy: bool | None = None
    """read the images of a folder or an .npy as they are needed, so that any number will do; by
    default where a folder's would take more than 1 GiB"""
    workers: int = 2
    """processes that read ahead, where images are read as needed"""
    cache: Path | None = None
    """an .npy file for a folder's images once they are decoded, 8 bits a channel"""

    def load(self) -> ImageData | LazyData:
        return load_data(
            self.data, self.size, self.labels, self.layout, self.value_range, self.background,
            not self.strict, self.lazy, self.workers, self.cache,
        )  # fmt: skip

    def record(self) -> dict:
        """The options as JSON has them, with whole paths; `of_record` reads them."""
        record = {k: str(v.resolve()) if isinstance(v, Path) else v for k, v in vars(self).items()}
        if Path(self.data).exists():
            record["data"] = str(Path(self.data).resolve())
        return record

    @classmethod
    def of_record(cls, record: dict) -> DataOptions:
        paths = {k: Path(record[k]) for k in ("labels", "cache") if record.get(k)}
        return cls(**{**record, **paths})


def record_of(folder: Path, name: str) -> dict:
    """What config.json tells of a run of `train`. Args: name: of the argument, for its errors.

    Raises: FileNotFoundError; ValueError for the run of a Trainer, which knows of no files.
    """
    file = folder / CONFIG_NAME
    if not file.is_file():
        raise FileNotFoundError(f"{name}: wanted {file}, which `train` writes; there is none")
    record = json.loads(file.read_text(encoding="utf-8"))
    if "data" not in record:
        raise ValueError(f"{name}: {file} does not tell where the data came from, as `train` does")
    return record
