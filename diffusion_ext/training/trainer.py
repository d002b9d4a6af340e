"""The training loop of Ho et al. 2020, algorithm 1, for any network, with context dropout."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..samplers.schedules import NoiseSchedule
from ..version import __version__
from .checkpoints import Checkpoint, load_checkpoint
from .compatibility import check_fit, check_same_run, configuration_of
from .config import TrainingConfig
from .data import Batch, ImageData, LazyData
from .draws import Draws, DrawTimesteps, batches_of
from .learner import Learner
from .logs import LossMeter, RunLog
from .optimizers import learning_rate
from .preview import Preview
from .progress import Progress
from .run_folder import RunFolder
from .validation import Validation


class Trainer:
    """Trains a network to predict the noise in noised images, or what else config.prediction says.

    Args:
        model: any module model(x_t [B,C,S,S], t/T [B], context [B,*] or None) -> [B,C,S,S]: a
            ContextUnet, a diffusers network by `adapters.from_diffusers`, your own. Trained in
            place, and moved to `device` and channels_last.
        schedule: the noise schedule; a flow takes from it T alone.
        data: images and contexts; ImageData is held on `device` whole, LazyData read as needed.
        folder: where checkpoints, log and pictures are written.
        config: see TrainingConfig.
        device: default the model's.
        draw_timesteps: (numpy Generator, n) -> n integers from 1 to T, in place of
            config.timestep_sampling.
        about: what else config.json is to tell, as where the data came from.

    Attributes:
        model: as trained. ema_model: its moving average, in evaluation mode: sample from this.
        losses: the mean loss of each epoch so far; validation_losses: that of the average on the
        images held out.

    Every random draw is a function of the seed and of the place in the run, so a run that is
    stopped and resumed continues exactly.

    Raises: ValueError where the data does not fit the model, or an option is not to be had.
    """

    def __init__(
        self,
        model: nn.Module,
        schedule: NoiseSchedule,
        data: ImageData | LazyData,
        folder: str | Path,
        config: TrainingConfig | None = None,
        device: torch.device | str | None = None,
        draw_timesteps: DrawTimesteps | None = None,
        about: dict | None = None,
    ):
        check_fit(model, data)
        self.config = config or TrainingConfig()
        first = next(model.parameters(), torch.empty(0))
        self.device = torch.device(device or first.device)
        self.schedule, self.data = schedule, data
        self.folder = RunFolder(folder, self.config.keep)
        self.learner = Learner(model, self.config, schedule, self.device)
        self.draws = Draws(self.config, schedule.timesteps, draw_timesteps)
        self.images, held_out = self.draws.split(len(data))
        if not len(self.images):
            raise ValueError(f"validation: {self.config.validation} leaves no image to train on")
        objective, size = self.learner.objective, self.config.batch_size
        self.validation = Validation(data, held_out, objective, schedule.timesteps, size)
        self.preview = Preview(self.config, schedule, data)
        self.progress = Progress()
        self.about = about or {}
        self._speed = math.nan  # images a second in the last epoch

    @property
    def model(self) -> nn.Module:
        return self.learner.model

    @property
    def ema_model(self) -> nn.Module:
        return self.learner.average.model

    @property
    def checkpoint_path(self) -> Path:
        return self.folder.checkpoint

    @property
    def losses(self) -> list[float]:
        return self.progress.losses

    @property
    def validation_losses(self) -> list[float]:
        return self.progress.validation_losses

    @property
    def steps(self) -> int:
        """Updates of the weights so far."""
        return self.progress.steps

    @property
    def samples_seen(self) -> int:
        return self.progress.images

    @property
    def epoch(self) -> int:
        """Epochs completed."""
        return len(self.losses)

    @property
    def batches_per_epoch(self) -> int:
        return -(-len(self.images) // self.config.batch_size)

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
        self.folder.write_config(self._description())
        meter = LossMeter(self.schedule.timesteps, self.device)
        log = RunLog(self.folder.path, self.steps, meter)
        devices = [self.device] if self.device.type == "cuda" else []
        try:
            with torch.random.fork_rng(devices):
                batches = self.data.batches(self._remaining(), self.device)
                while self.epoch < self.config.epochs:
                    self._train_epoch(batches, log, progress)
                    self._end_epoch(log, progress)
        finally:
            log.close()
        return self.losses

    def _remaining(self) -> Iterator[np.ndarray]:
        """The images of every batch that is still to come, in this epoch and the later ones."""
        skipped = self.progress.batches
        for epoch in range(self.epoch, self.config.epochs):
            order = self.draws.order(epoch, self.images)
            yield from list(batches_of(order, self.config.batch_size))[skipped:]
            skipped = 0

    def _train_epoch(self, batches: Iterator[Batch], log: RunLog, progress: bool) -> None:
        state, config = self.progress, self.config
        self.model.train()
        bar = tqdm(
            total=len(self.images),
            initial=state.batches * config.batch_size,
            desc=self._label(self.epoch + 1),
            unit=" images",
            leave=False,
            mininterval=0.5,
            disable=None if progress else True,  # None: only where stderr is a terminal
        )
        saved = start = time.perf_counter()
        before = state.images
        log.begin(state.images)
        with bar:
            while state.batches < self.batches_per_epoch:
                images = state.images
                norm = self._step(batches, log.meter)
                if state.steps % config.log_every == 0:
                    rate = self.learner.optimizer.param_groups[0]["lr"]
                    log.line({**self._known(), "learning_rate": rate}, norm)
                if bar.update(state.images - images):  # only then the loss is read, which waits
                    bar.set_postfix(loss=f"{state.mean_loss:.4f}")
                minutes = (time.perf_counter() - saved) / 60
                if config.checkpoint_minutes and minutes > config.checkpoint_minutes:
                    self.folder.save(self.checkpoint())
                    saved = time.perf_counter()
        self._speed = (state.images - before) / (time.perf_counter() - start)

    def _step(self, batches: Iterator[Batch], meter: LossMeter) -> Tensor | None:
        """One update of the weights. Returns the gradient's norm, where it is known."""
        config, state = self.config, self.progress
        first, last = state.batches, min(state.batches + config.accumulate, self.batches_per_epoch)
        sizes = [
            min(config.batch_size, len(self.images) - i * config.batch_size)
            for i in range(first, last)
        ]
        for size in sizes:
            number = self.epoch * self.batches_per_epoch + state.batches
            draws = self.draws.batch(number, state.images, size, self.device)
            batch = next(batches)
            state.batches += 1
            state.images += size
            if batch.kept is not None:
                draws = draws.of(batch.kept)
            if not len(batch):
                continue
            torch.manual_seed(self.draws.torch_seed(number))
            trained, losses = self.learner.backward(batch, draws, sum(sizes))
            state.loss = state.loss + trained.sum()
            state.loss_images += len(batch)
            meter.add(trained, losses, draws.t)
        lr = learning_rate(config, state.steps, -(-self.batches_per_epoch // config.accumulate))
        state.steps += 1
        return self.learner.update(state.steps, lr, state.steps % config.log_every == 0)

    def _known(self) -> dict[str, float]:
        """Where the run is, for a line of the log."""
        state = self.progress
        epoch = round(self.epoch + state.batches / self.batches_per_epoch, 4)
        return {"step": state.steps, "epoch": epoch, "images": state.images}

    def _end_epoch(self, log: RunLog, progress: bool) -> None:
        state, config = self.progress, self.config
        loss = state.mean_loss
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"the loss of epoch {self.epoch + 1} is {loss}: try a lower learning rate"
            )
        state.end_epoch(loss)
        if len(self.validation):
            loss = self.validation.loss(self.learner.predict_averaged, self.device)
            state.validation_losses.append(loss)
            log.flush()
            log.write({**self._known(), "seconds": log.seconds, "validation_loss": loss})
        if self.epoch == 1 and progress and isinstance(self.data, LazyData):
            for line in self.data.left_out():
                tqdm.write(line)
        if config.samples_every and self._due(config.samples_every):
            picture = self.preview.draw(self.ema_model, self.device)
            picture.save(self.folder.picture(self.epoch))
            log.picture("samples", np.asarray(picture), self.steps)
        if self._due(config.checkpoint_every):
            self.folder.save(self.checkpoint(), self._is_best())
            if progress:
                tqdm.write(self._line())

    def _due(self, every: int, epoch: int | None = None) -> bool:
        epoch = epoch or self.epoch
        return epoch % every == 0 or epoch == self.config.epochs

    def _is_best(self) -> bool:
        """Whether no earlier checkpoint had a lower loss on the images held out."""
        *earlier, last = self.validation_losses or [math.nan]
        due = [v for i, v in enumerate(earlier, 1) if self._due(self.config.checkpoint_every, i)]
        return last <= min(due, default=math.inf)

    def _line(self) -> str:
        """What an epoch came to, and how long the others will take."""
        parts = [self._label(self.epoch), f"loss {self.losses[-1]:.4f}"]
        if self.validation_losses:
            parts.append(f"held out {self.validation_losses[-1]:.4f}")
        left = (self.config.epochs - self.epoch) * len(self.images) / self._speed
        if self.epoch < self.config.epochs:
            parts.append(f"{tqdm.format_interval(left)} left")
        return "  ".join([*parts, f"{self._speed:.0f} images/s"])

    def _label(self, epoch: int) -> str:
        return f"epoch {epoch:{len(str(self.config.epochs))}}/{self.config.epochs}"

    def _description(self) -> dict:
        """What config.json tells."""
        return {
            "diffusion_ext": __version__,
            "torch": torch.__version__,
            "model": {"class": type(self.model).__name__, **configuration_of(self.model)},
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "timesteps": self.schedule.timesteps,
            "training": asdict(self.config),
            "images": len(self.images),
            "held_out": len(self.data) - len(self.images),
            "shape": list(self.data.shape),
            "classes": list(self.data.class_names),
            **self.about,
        }

    def checkpoint(self) -> Checkpoint:
        """The state of the run."""
        return Checkpoint(
            **self.learner.state(),
            **self.progress.state(),
            schedule=self.schedule,
            model_configuration=configuration_of(self.model),
            training=asdict(self.config),
            class_names=self.data.class_names,
        )

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continues from a checkpoint of the same model, schedule and training, of any length.

        Raises: ValueError naming what differs.
        """
        check_same_run(checkpoint, self.model, self.config, self.schedule)
        self.learner.restore(checkpoint)
        self.progress = Progress.of(checkpoint, self.device)
        self.folder.went_on_from(checkpoint.steps)
