"""Training data: square images in [-1, 1] with a context for each, in memory or read as needed."""

from .arrays import load_image_array
from .datasets import from_dataset
from .digits import load_digits
from .emoji import load_emoji
from .folders import load_image_folder
from .image_data import Batch, ImageData
from .lazy import LazyData
from .load import load_data
from .mapped import cached, map_image_array

__all__ = [
    "Batch",
    "ImageData",
    "LazyData",
    "cached",
    "from_dataset",
    "load_data",
    "load_digits",
    "load_emoji",
    "load_image_array",
    "load_image_folder",
    "map_image_array",
]
