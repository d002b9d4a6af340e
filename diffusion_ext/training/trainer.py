"""The training loop of Ho et al. 2020, algorithm 1, with context dropout for guidance."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from ..nn.context_unet import ContextUnet
from ..samplers.noising import NOISINGS, perturb
from ..samplers.schedules import NoiseSchedule
from .checkpoints import Checkpoint, load_checkpoint, save_checkpoint
from .data import ImageData
from .ema import ExponentialMovingAverage

CHECKPOINT_NAME = "checkpoint.safetensors"
MAX_SEED = 2**31 - 1


@dataclass(frozen=True)
class TrainingConfig:
    """How to train."""

    epochs: int = 32
    """passes over the data"""
    batch_size: int = 100
    """images in a step"""
    learning_rate: float = 1e-3
    """Adam's; falls linearly per epoch, towards 0 at the end"""
    context_keep: float = 0.9
    """probability that a sample keeps its context, which guidance needs to be below 1"""
    ema_decay: float = 0.995
    """decay of the moving average of the weights"""
    checkpoint_every: int = 4
    """epochs between checkpoints; the last epoch always writes one"""
    seed: int = 0
    """of the noise, the times, the order and the context dropout"""
    noising: Literal["standard", "course"] = "standard"
    """how images are noised; course: without the root of the noise's variance, as its notebook"""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: wanted at least 1, got {getattr(self, name)}")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate: wanted more than 0, got {self.learning_rate}")
        if not 0 <= self.context_keep <= 1:
            raise ValueError(f"context_keep: wanted a probability, got {self.context_keep}")
        if self.noising not in NOISINGS:
            raise ValueError(f"noising: wanted one of {tuple(NOISINGS)}, got {self.noising!r}")
        if not 0 <= self.seed <= MAX_SEED:
            raise ValueError(f"seed: wanted 0 to {MAX_SEED}, got {self.seed}")


class Trainer:
    """Trains a ContextUnet to predict the noise in noised images.

    Args:
        model: trained in place, and moved to `device` and channels_last.
        schedule: the noise schedule; times are drawn uniformly from 1..T.
        data: held on `device` whole.
        folder: where the checkpoint is written.
        config: see TrainingConfig.
        device: default the model's.

    Attributes:
        model: as trained. ema_model: its moving average, in evaluation mode: sample from this.
        losses: the mean loss of each epoch so far.

    Every random draw is a function of the seed and of the epoch or the number of samples seen, so
    a run that is stopped and resumed continues exactly.

    Raises: ValueError where the data does not fit the model.
    """

    def __init__(
        self,
        model: ContextUnet,
        schedule: NoiseSchedule,
        data: ImageData,
        folder: str | Path,
        config: TrainingConfig | None = None,
        device: torch.device | str | None = None,
    ):
        _check_fit(model, data)
        self.config = config or TrainingConfig()
        self.device = torch.device(device or next(model.parameters()).device)
        self.model = model.to(self.device, memory_format=torch.channels_last)
        self.schedule = schedule
        self.images = data.images.to(self.device, memory_format=torch.channels_last)
        self.contexts = data.contexts.to(self.device)
        self.class_names = data.class_names
        self.checkpoint_path = Path(folder) / CHECKPOINT_NAME
        self.ema = ExponentialMovingAverage(self.model, self.config.ema_decay)
        self.optimizer = torch.optim.Adam(
            self.model.parameters(), self.config.learning_rate, fused=True
        )
        self.losses: list[float] = []
        self.steps = 0
        self.samples_seen = 0

    @property
    def ema_model(self) -> ContextUnet:
        return self.ema.model

    @property
    def epoch(self) -> int:
        """Epochs completed."""
        return len(self.losses)

    def fit(self, resume: bool = False, progress: bool = True) -> list[float]:
        """Trains to the last epoch, writing checkpoints on the way.

        Args:
            resume: continue from the folder's checkpoint.
            progress: show a bar for each epoch (on a terminal), and a line at each checkpoint.

        Returns: the mean loss of each epoch.

        Raises:
            FileExistsError: where there is a checkpoint and resume is False.
            FileNotFoundError, ValueError: where there is none to resume, or one of another run.
            FloatingPointError: the loss became infinite or NaN; the last checkpoint stays.
        """
        if resume:
            self.restore(load_checkpoint(self.checkpoint_path))
        elif self.checkpoint_path.exists():
            raise FileExistsError(
                f"{self.checkpoint_path} is there already: resume it, or choose another folder"
            )
        self.checkpoint_path.parent.mkdir(parents=True, exist_ok=True)
        while self.epoch < self.config.epochs:
            start = time.perf_counter()
            loss = self._train_epoch(progress)
            if not math.isfinite(loss):
                raise FloatingPointError(
                    f"the loss of epoch {self.epoch + 1} is {loss}: try a lower learning rate"
                )
            self.losses.append(loss)
            speed = len(self.images) / (time.perf_counter() - start)
            if self.epoch % self.config.checkpoint_every == 0 or self.epoch == self.config.epochs:
                save_checkpoint(self.checkpoint(), self.checkpoint_path)
                if progress:
                    label = self._epoch_label(self.epoch)
                    tqdm.write(f"{label}  loss {loss:.4f}  {speed:.0f} images/s")
        return self.losses

    def _epoch_label(self, epoch: int) -> str:
        return f"epoch {epoch:{len(str(self.config.epochs))}}/{self.config.epochs}"

    def _train_epoch(self, progress: bool) -> float:
        self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * (1 - self.epoch / self.config.epochs)
        random = np.random.default_rng((self.config.seed, self.epoch))
        order = torch.from_numpy(random.permutation(len(self.images))).to(self.device)
        total = torch.zeros((), device=self.device)
        bar = tqdm(
            total=len(self.images),
            desc=self._epoch_label(self.epoch + 1),
            unit=" images",
            leave=False,
            mininterval=0.5,
            disable=None if progress else True,  # None: only where stderr is a terminal
        )
        devices = [self.device] if self.device.type == "cuda" else []
        with bar, torch.random.fork_rng(devices):
            # For what draws inside the model, such as ContextUnet's random shortcut.
            torch.manual_seed(int(random.integers(MAX_SEED)))
            for index in order.split(self.config.batch_size):
                total += self._train_step(index, random) * len(index)
                if bar.update(len(index)):  # the loss is read, which waits, only when it is shown
                    bar.set_postfix(loss=f"{total.item() / bar.n:.4f}")
        return total.item() / len(self.images)

    def _train_step(self, index: Tensor, random: np.random.Generator) -> Tensor:
        """index: int64 [B] of the images. Returns the mean loss, [] on the device."""
        batch, last = len(index), self.schedule.timesteps
        t = torch.from_numpy(random.integers(1, last + 1, batch)).to(self.device)
        keep = torch.from_numpy(random.random(batch) < self.config.context_keep).to(self.device)
        context = self.contexts[index] * keep[:, None]
        # A seed of its own for each sample ever seen, so that no noise comes twice.
        seeds = (self.config.seed << 32) + self.samples_seen + torch.arange(batch)
        seeds, noising = seeds.to(self.device), self.config.noising
        x_t, noise = perturb(self.images[index], t, self.schedule, seeds=seeds, noising=noising)

        loss = F.mse_loss(self.model(x_t, t / last, context), noise)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

        self.steps += 1
        self.samples_seen += batch
        self.ema.update(self.model, self.steps)
        return loss.detach()

    def checkpoint(self) -> Checkpoint:
        """The state of the run."""
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        optimizer = {
            f"{names[parameter]}.{name}": value
            for parameter, state in self.optimizer.state.items()
            for name, value in state.items()
        }
        return Checkpoint(
            model=self.model.state_dict(),
            ema=self.ema_model.state_dict(),
            optimizer=optimizer,
            schedule=self.schedule,
            model_configuration=self.model.configuration,
            training=asdict(self.config),
            class_names=self.class_names,
            losses=self.losses,
            steps=self.steps,
            samples_seen=self.samples_seen,
        )

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continues from a checkpoint of the same model, schedule and training, of any length.

        Raises: ValueError naming what differs.
        """
        self._check_same_run(checkpoint)
        self.model.load_state_dict(checkpoint.model)
        self.ema_model.load_state_dict(checkpoint.ema)
        parameters = dict(self.model.named_parameters())
        for key, value in checkpoint.optimizer.items():
            name, _, field = key.rpartition(".")
            parameter = parameters[name]
            value = value.to(parameter.device)
            if value.shape == parameter.shape:  # a moment: in the parameter's memory format
                value = torch.empty_like(parameter, requires_grad=False).copy_(value)
            self.optimizer.state[parameter][field] = value
        self.losses = list(checkpoint.losses)
        self.steps = checkpoint.steps
        self.samples_seen = checkpoint.samples_seen

    def _check_same_run(self, checkpoint: Checkpoint) -> None:
        wanted = self.model.configuration | asdict(self.config)
        # An older checkpoint lacks what was fixed then, at the default of today.
        found = checkpoint.model_configuration | asdict(TrainingConfig()) | checkpoint.training
        for name in wanted.keys() - {"epochs", "checkpoint_every"}:
            if wanted[name] != found[name]:
                raise ValueError(
                    f"{name}: the checkpoint to resume has {found[name]}, this run {wanted[name]}"
                )
        if not np.array_equal(checkpoint.schedule.alpha_bar, self.schedule.alpha_bar):
            raise ValueError("schedule: the checkpoint to resume has another one")


def _check_fit(model: ContextUnet, data: ImageData) -> None:
    image = [model.in_channels, model.height, model.height]
    if list(data.images.shape[1:]) != image:
        raise ValueError(
            f"data: wanted images {['N', *image]} for this model, got {list(data.images.shape)}"
        )
    if data.contexts.shape[1] != model.n_cfeat:
        raise ValueError(
            f"data: wanted contexts ['N', {model.n_cfeat}] for this model, "
            f"got {list(data.contexts.shape)}"
        )
