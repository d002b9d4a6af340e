"""Training a ContextUnet: data, the trainer, and checkpoints to sample from or to continue."""

from .checkpoints import Checkpoint, load_checkpoint, save_checkpoint
from .data import ImageData, load_data, load_digits, load_image_array, load_image_folder
from .ema import ExponentialMovingAverage
from .state_dicts import StateDictOptions, TrainedModel, load_trained, save_state_dict
from .trainer import CHECKPOINT_NAME, Trainer, TrainingConfig

__all__ = [
    "CHECKPOINT_NAME",
    "Checkpoint",
    "ExponentialMovingAverage",
    "ImageData",
    "StateDictOptions",
    "TrainedModel",
    "Trainer",
    "TrainingConfig",
    "load_checkpoint",
    "load_data",
    "load_digits",
    "load_image_array",
    "load_image_folder",
    "load_trained",
    "save_checkpoint",
    "save_state_dict",
]
