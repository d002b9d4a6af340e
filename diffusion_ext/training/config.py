"""How to train: the options of a run. Those that are None are planned from the data (plan.py); the
other defaults are the course's."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from ..checks import check_choice
from ..samplers.noising import NOISINGS
from ..samplers.rows import PREDICTIONS

MAX_SEED = 2**31 - 1

Prediction = Literal["epsilon", "v", "x0", "flow"]
LearningRateSchedule = Literal["linear", "cosine", "constant"]
TimestepSampling = Literal["uniform", "logit-normal"]
Precision = Literal["float32", "bfloat16", "float16"]

CHOICES = {
    "prediction": (*PREDICTIONS, None),
    "noising": tuple(n for n in NOISINGS if n != "flow"),
    "lr_schedule": ("linear", "cosine", "constant"),
    "timestep_sampling": ("uniform", "logit-normal", None),
    "precision": ("float32", "bfloat16", "float16"),
}
# (field, the least it may be)
LEAST = {
    "steps": 1,
    "epochs": 1,
    "batch_size": 1,
    "accumulate": 1,
    "checkpoint_every": 1,
    "keep": 1,
    "log_every": 1,
    "warmup": 0,
    "samples_every": 0,
}
ABOVE_0 = ("learning_rate", "huber", "min_snr", "clip_gradient", "checkpoint_minutes")
# What a run may be resumed with another value of: its length, and what is written on the way.
FREE = {
    "steps", "epochs", "checkpoint_every", "checkpoint_minutes", "keep", "log_every",
    "samples_every", "compile", "skip_bad_steps", "shard",
}  # fmt: skip


@dataclass(frozen=True)
class TrainingConfig:
    """How to train. Raises: ValueError for a field out of range, naming it."""

    steps: int | None = None
    """updates of the weights; default 32 epochs, or what a small folder needs if that is more"""
    epochs: int | None = None
    """passes over the data, in place of --steps"""
    batch_size: int | None = None
    """images that the network sees at once; default 100, fewer for a small folder"""
    accumulate: int = 1
    """batches whose gradients a step adds up: one update of the weights for all their images"""

    prediction: Prediction | None = "epsilon"
    """what the network predicts: the noise, v, the image, or the velocity of rectified flow, whose
    images go to noise in a straight line; None: v, or the noise with the course's noising"""
    noising: Literal["standard", "course"] = "standard"
    """how images are noised; course: without the root of the noise's variance, as its notebook"""
    huber: float | None = None
    """Huber's penalty, straight beyond this residual, in place of the square"""
    min_snr: float | None = None
    """weigh the timesteps by min(SNR, this) (Hang et al. 2023); 5 is usual"""
    timestep_sampling: TimestepSampling | None = "uniform"
    """which timesteps are trained how often; logit-normal: mostly the middle (Esser et al. 2024);
    None: that, or uniform with the course's noising"""
    context_keep: float = 0.9
    """probability that an image keeps its context, which guidance needs to be below 1"""
    flip: bool | None = None
    """mirror half of the images, left to right; default where mirrored images look like the rest"""

    optimizer: str = "Adam"
    """any optimizer of torch.optim by name, such as AdamW"""
    optimizer_options: dict[str, float] = field(default_factory=dict)
    """further arguments of it, such as weight_decay 0.01"""
    learning_rate: float = 1e-3
    """the optimizer's, before lr_schedule"""
    lr_schedule: LearningRateSchedule = "linear"
    """how the learning rate falls: linear towards 0, by the epoch, and by the step where the run
    ends within one; cosine, by the step; constant"""
    warmup: int = 0
    """steps in which the learning rate rises from 0"""
    clip_gradient: float | None = None
    """the largest norm of the gradient; a longer one is shortened to it"""
    skip_bad_steps: bool = False
    """leave out, and count, the steps whose loss or gradient is infinite or NaN, in place of ending
    the run; each step then waits for the device"""
    precision: Precision = "float32"
    """of the network's arithmetic, by torch's autocast; weights and losses stay float32"""
    compile: bool = False
    """train the network under torch.compile"""
    shard: bool = False
    """of several processes: each holds a part of the weights and of the optimizer's state alone
    (FSDP), for networks beyond one GPU's memory"""

    ema_decay: float = 0.995
    """decay of the moving average of the weights, the longest; it warms up"""
    ema_std: float | None = None
    """relative width of a power-function average in its place, as 0.05 (Karras et al. 2024)"""

    validation: float = 0.0
    """share of the images that is held out, to measure the loss on"""
    checkpoint_every: int | None = None
    """epochs between checkpoints; the last step always writes one; default an eighth of the run"""
    checkpoint_minutes: float | None = None
    """minutes after which there is one within an epoch too"""
    keep: int = 2
    """how many of the last checkpoints stay, beside the best where images are held out"""
    log_every: int = 50
    """steps between lines of the log"""
    samples_every: int | None = None
    """epochs between pictures of samples; 0: none; default an eighth of the run"""
    seed: int = 0
    """of every random draw"""

    def __post_init__(self) -> None:
        for name, least in LEAST.items():
            count = getattr(self, name)
            if count is not None and count < least:
                raise ValueError(f"{name}: wanted at least {least}, got {count}")
        for name in ABOVE_0:
            value: Any = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}: wanted more than 0, got {value}")
        for name, choices in CHOICES.items():
            check_choice(name, getattr(self, name), choices)
        if not 0 <= self.context_keep <= 1:
            raise ValueError(f"context_keep: wanted a probability, got {self.context_keep}")
        if not 0 <= self.validation < 1:
            raise ValueError(f"validation: wanted a share below 1, got {self.validation}")
        if not 0 <= self.seed <= MAX_SEED:
            raise ValueError(f"seed: wanted 0 to {MAX_SEED}, got {self.seed}")
        if self.shard and self.precision == "float16":
            raise ValueError("precision: wanted bfloat16 or float32 with shard, got float16")
        if self.prediction == "flow" and self.noising != "standard":
            raise ValueError(f"noising: a flow has its own, got {self.noising!r}")

    @property
    def path(self) -> str:
        """How images are noised, of samplers.noising.NOISINGS."""
        return "flow" if self.prediction == "flow" else self.noising
