"""Training: data, the trainer of any network, and checkpoints to sample from or to continue."""

from .checkpoints import Checkpoint, load_checkpoint, save_checkpoint
from .config import TrainingConfig
from .data import (
    ImageData,
    LazyData,
    cached,
    from_dataset,
    load_data,
    load_digits,
    load_emoji,
    load_image_array,
    load_image_folder,
    map_image_array,
)
from .ema import ExponentialMovingAverage
from .logs import read_log
from .state_dicts import StateDictOptions, load_trained, save_state_dict
from .trained_model import TrainedModel
from .trainer import Trainer
from .weights_files import CHECKPOINT_NAME

__all__ = [
    "CHECKPOINT_NAME",
    "Checkpoint",
    "ExponentialMovingAverage",
    "ImageData",
    "LazyData",
    "StateDictOptions",
    "TrainedModel",
    "Trainer",
    "TrainingConfig",
    "cached",
    "from_dataset",
    "load_checkpoint",
    "load_data",
    "load_digits",
    "load_emoji",
    "load_image_array",
    "load_image_folder",
    "load_trained",
    "map_image_array",
    "read_log",
    "save_checkpoint",
    "save_state_dict",
]
