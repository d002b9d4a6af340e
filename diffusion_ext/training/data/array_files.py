"""What an .npy or .npz file says that it holds, checked before any memory is taken for it."""

from __future__ import annotations

import math
import zipfile
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ...ops.memory import memory_available

FLOAT_BYTES = 4  # of each value, once it is an image


def check_array_file(path: Path, fits_in_memory: bool, name: str = "data") -> None:
    """A file whose arrays are as long as their headers say.

    Args: fits_in_memory: their values, and as float32 too, have to fit into free memory.
        name: what errors call the file.
    Raises: ValueError for another file, or one that does not fit.
    """
    try:
        needed = _needed_of_npz(path) if zipfile.is_zipfile(path) else _needed_of_npy(path)
    except (ValueError, EOFError, OSError, zipfile.BadZipFile, NotImplementedError) as error:
        raise ValueError(f"{name}: cannot read the array {path}: {error}") from error
    free = memory_available()
    if fits_in_memory and needed > free:
        raise ValueError(
            f"{name}: {path} wants {needed / 2**30:.3g} GiB of memory, of which {free / 2**30:.3g} "
            "are free; --lazy True reads an .npy as needed"
        )


def _needed_of_npy(path: Path) -> int:
    with open(path, "rb") as file:
        return _needed(file, path.stat().st_size)


def _needed_of_npz(path: Path) -> int:
    with zipfile.ZipFile(path) as archive:
        needed = 0
        for member in archive.infolist():
            with archive.open(member) as file:
                needed += _needed(file, member.file_size)
        return needed


def _needed(file: BinaryIO, length: int) -> int:
    """Bytes for an array and its float32 form. Raises: ValueError where its values are more than
    the rest of the file."""
    version = np.lib.format.read_magic(file)
    read = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}
    if version[0] not in read:
        raise ValueError(f"its format {version} is not known")
    shape, _, dtype = read[version[0]](file)
    count = math.prod(shape)
    if not dtype.hasobject and count * dtype.itemsize > length - file.tell():
        raise ValueError(
            f"its header promises {dtype} {list(shape)}, {count * dtype.itemsize} bytes, of which "
            f"it has {length - file.tell()}"
        )
    return count * (dtype.itemsize + FLOAT_BYTES)
