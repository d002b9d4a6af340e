"""The training loop of Ho et al. 2020, algorithm 1, for any network, with context dropout."""

from __future__ import annotations

import contextlib
import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from ..checks import counted
from ..samplers.schedules import NoiseSchedule
from .checkpoints import TENSOR_GROUPS, Checkpoint
from .clock import Clock
from .compatibility import check_fit, check_same_run, configuration_of
from .config import TrainingConfig
from .data import ImageData, LazyData
from .draws import Draws, DrawTimesteps, split
from .folder_lock import FolderLock
from .interrupts import Interrupts, exit_by
from .learner import Learner
from .logs import LossMeter, RunLog
from .loss_watch import LossWatch
from .plan import batches_per_epoch, epochs_of_a_part, planned
from .preview import Preview
from .processes import Processes
from .progress import Progress
from .reporting import Forecast, Pace, description, known, place, progress_bar, progress_line
from .run_folder import RunFolder
from .sharding import whole
from .steps import Steps
from .torchrun import started_by_torchrun
from .validation import Validation

VALIDATIONS = 32  # times that the loss held out is measured in a run, and no more than every epoch
SAVE = 1  # a wish of a process; the others are the numbers of signals, which are larger


class Trainer:
    """Trains a network to predict the noise in noised images, or what config.prediction names.

    Args:
        model: any module model(x_t [B,C,S,S], t/T [B], context [B,*] or None) -> [B,C,S,S]: a
            ContextUnet, a diffusers network by `adapters.from_diffusers`, your own. Trained in
            place, and moved to `device` and channels_last.
        schedule: the noise schedule; of it a flow needs only T.
        data: images and contexts; ImageData is held on `device` whole, LazyData read as needed.
        folder: where checkpoints, log and pictures are written.
        config: see TrainingConfig; its options that are None are planned from the data.
        device: default the model's.
        draw_timesteps: (numpy Generator, n) -> n integers from 1 to T, in place of
            config.timestep_sampling.
        about: what config.json shall say too, such as where the data came from.

    Attributes:
        config: as planned: config.steps is the length of the run.
        model: as trained.
        ema_model: its moving average, in evaluation mode: sample from this.
        losses: the mean loss of each whole epoch so far.
        validation_losses: those of the average on the images held out; NaN after the epochs where
            it was not measured, of runs of more than 32.

    Every random draw is a function of the seed and of the place in the run, so a run that is
    stopped and resumed continues exactly.

    Raises: ValueError where the data does not fit the model, or an option is not available.
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
        about: dict[str, Any] | None = None,
    ):
        check_fit(model, data)
        config = config or TrainingConfig()
        self.images, held_out = split(len(data), config)
        if not len(self.images):
            raise ValueError(f"validation: {config.validation} leaves no image to train on")
        self.config = planned(config, data, len(self.images))
        first = next(model.parameters(), torch.empty(0))
        self.device = torch.device(device or first.device)
        self.schedule, self.data = schedule, data
        self.folder = RunFolder(folder, self.config.keep)
        self.processes = Processes()
        self.learner = Learner(
            model, self.config, schedule, self.device, self.processes, data.shape,
            data.context_shape,
        )  # fmt: skip
        self.draws = Draws(self.config, schedule.timesteps, draw_timesteps)
        objective, size = self.learner.objective, self.config.batch_size
        self.validation = Validation(
            data, held_out, objective, schedule.timesteps, size, self.processes
        )
        self.preview = Preview(self.config, schedule, data)
        self.progress = Progress()
        self.about = about or {}
        self._watch = LossWatch(data.name_of, self.folder.last)
        self._validate_every = epochs_of_a_part(self.config, len(self.images), VALIDATIONS)
        self._least_held_out = math.inf  # of the checkpoints so far
        self._pace = Pace()
        self._clock = Clock(self.config.checkpoint_minutes)

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
        return batches_per_epoch(self.config, len(self.images))

    def fit(self, resume: bool | str | Path = False, progress: bool = True) -> list[float]:
        """Trains to the last step, writing checkpoints on the way.

        Ctrl-C and SIGTERM end it after a step and a checkpoint; a second one ends the process at
        once. In processes that torchrun started, each trains its share of every batch.

        Args:
            resume: continue from the folder's checkpoint; or the path of another one of this run.
            progress: show a bar (on a terminal), and a line at each checkpoint.

        Returns: the mean loss of each whole epoch.

        Raises:
            FileExistsError: where there is a checkpoint and resume is False.
            BlockingIOError: where another run writes into the folder.
            FileNotFoundError, ValueError: where there is none to resume, one of another run, or a
                damaged one.
            FloatingPointError: a step's loss was infinite or NaN; the last checkpoint stays.
            OSError: a checkpoint cannot be written; the last one stays.
            KeyboardInterrupt, SystemExit: after SIGINT, SIGTERM.
        """
        progress = progress and self.processes.first
        with contextlib.ExitStack() as stack:
            if self.processes.first:
                stack.enter_context(contextlib.closing(FolderLock(self.folder.path)))
            self._begin(resume)
            meter = LossMeter(self.schedule.timesteps, self.device)
            log = RunLog(self.folder.path, self.steps, meter, self.processes, self.epoch)
            stack.enter_context(contextlib.closing(log))
            devices = [self.device] if self.device.type == "cuda" else []
            stack.enter_context(torch.random.fork_rng(devices))
            interrupts = stack.enter_context(Interrupts(patient=started_by_torchrun()))
            steps = Steps(
                self.config, self.data, self.images, self.draws, self.learner, self.progress,
                self.processes, self._watch,
            )  # fmt: skip
            stack.enter_context(contextlib.closing(steps))
            bar = stack.enter_context(progress_bar(self, progress))
            forecast = Forecast(self, progress)
            self._clock = Clock(self.config.checkpoint_minutes)
            while not self._ended or self._epoch_is_over:
                self._train_epoch(steps, log, interrupts, bar, forecast)
                self._end_epoch(log, progress)
            self.processes.settle()
            self.processes.wait()
            if interrupts.signal:
                raise exit_by(interrupts.signal)
        return self.losses

    def _begin(self, resume: bool | str | Path) -> None:
        if resume:
            path = None if resume is True else Path(resume)
            self.restore(self.folder.load(self.learner.likeness(), path), path)
        elif there := self.folder.last_checkpoint():
            raise FileExistsError(f"{there} is there already: resume it, or choose another folder")
        if self.processes.first:  # what a run of `train` said stays, where Python goes on with it
            before = self.folder.config() if resume else {}
            self.folder.write_config({**before, **description(self)})

    @property
    def _ended(self) -> bool:
        return self.steps >= self.config.steps

    @property
    def _epoch_is_over(self) -> bool:
        return self.progress.batches == self.batches_per_epoch

    def _train_epoch(
        self, steps: Steps, log: RunLog, interrupts: Interrupts, bar: tqdm, forecast: Forecast
    ) -> None:
        """To the end of the epoch, or of the run."""
        state, config = self.progress, self.config
        self.model.train()
        start, before = time.perf_counter(), state.images
        log.begin(state.images)
        while not (self._epoch_is_over or self._ended):
            norm = steps.step(log.meter)
            if state.steps % config.log_every == 0:
                log.line(known(self), norm)
            if bar.update():  # only then the loss is read, which waits
                bar.set_postfix(loss=f"{state.mean_loss:.4f}")
            forecast.look()
            wish = self.processes.agree(interrupts.signal or self._clock.rings() * SAVE)
            if wish:
                self._save(log)
            if wish > SAVE:
                raise exit_by(wish)
        self._pace.add(state.images - before, time.perf_counter() - start)

    def _end_epoch(self, log: RunLog, progress: bool) -> None:
        """What is due after an epoch, and at the end of the run. That may come within an epoch,
        which then stays open, for a longer run to go on with."""
        whole = self._epoch_is_over
        self._watch.settle()
        loss, held_out = self._mean_loss(whole), math.nan
        if whole:
            self.progress.end_epoch(loss)
        if len(self.validation):
            if self._due(self._validate_every) or self._due(self.config.checkpoint_every):
                held_out = self._validation_loss(log)
            self.validation_losses.extend([held_out] * whole)
        if self.epoch == whole and progress and isinstance(self.data, LazyData):  # the first
            for line in self.data.left_out():
                tqdm.write(line)
        noise = None
        if self.config.samples_every and self._due(self.config.samples_every):
            noise = self._preview(log)
        if self._due(self.config.checkpoint_every):
            best = whole and held_out <= self._least_held_out
            self._least_held_out = held_out if best else self._least_held_out
            self._save(log, best)
            if progress:
                tqdm.write(progress_line(self, loss, held_out, noise, self._pace.take()))

    def _mean_loss(self, whole: bool) -> float:
        """Of the epoch that is open. Raises: FloatingPointError where a whole one had no image."""
        loss = self.progress.over(self.processes, self.device).mean_loss
        if math.isnan(loss) and whole:
            skipped = counted(self.progress.skipped, "step")
            skipped += " was" if self.progress.skipped == 1 else " were"
            raise FloatingPointError(
                f"epoch {self.epoch + 1} trained no image: {skipped} skipped, and other "
                f"images cannot be read. {self.folder.last()}"
            )
        return loss

    def _validation_loss(self, log: RunLog) -> float:
        """Of the average, on the images held out; it is a line of the log."""
        learner = self.learner
        loss = self.validation.loss(
            learner.predict_averaged, self.device, learner.stand_in_averaged
        )
        log.flush()
        log.write({**place(self), "seconds": log.seconds, "validation_loss": loss})
        return loss

    def _preview(self, log: RunLog) -> float | None:
        """A picture of samples, in the folder and in the log. Returns: how much of them is noise;
        None in a process beside the first."""
        if not (self.processes.first or self.learner.sharded):  # which takes all of them
            return None
        samples = self.preview.samples(self.ema_model, self.device)
        if not self.processes.first:
            return None
        picture = self.preview.picture(samples)
        self.folder.save_picture(picture, self.steps)
        log.picture("samples", np.asarray(picture), self.steps)
        return self.preview.noise_in(samples)

    def _save(self, log: RunLog, best: bool = False) -> None:
        """A checkpoint of finite weights, and the log so far; every process has to come here."""
        self._watch.settle()
        if not self.learner.is_finite():
            raise FloatingPointError(
                f"the weights after step {self.steps} are not finite, though its loss was. "
                f"{self.folder.last()}"
            )
        log.flush()
        if self.learner.sharded and not self._ended:
            self.folder.save_sharded(self._state(self.learner.state()), self.processes)
            return
        checkpoint = self.checkpoint()
        if self.processes.first:
            self.folder.save(checkpoint, best)

    def _due(self, every: int) -> bool:
        return self.epoch % every == 0 or self._ended

    def checkpoint(self) -> Checkpoint:
        """The state of the run; of several processes, each has to ask. Where they have parts of the
        network, the first one gets it whole, and the others nothing of it."""
        state = self.learner.state()
        if self.learner.sharded:
            for group in TENSOR_GROUPS:
                state[group] = whole(state[group], self.processes)
        return self._state(state)

    def _state(self, learned: dict) -> Checkpoint:
        """Args: learned: the Learner's part of it."""
        return Checkpoint(
            **learned,
            **self.progress.over(self.processes, self.device).state(),
            schedule=self.schedule,
            model_configuration=configuration_of(self.model),
            training=asdict(self.config),
            class_names=self.data.class_names,
        )

    def restore(self, checkpoint: Checkpoint, path: Path | None = None) -> None:
        """Continues from a checkpoint of the same model, schedule and training, of any length.

        Args: path: where it is, if that is not the folder's last one.
        Raises: ValueError naming what differs.
        """
        check_same_run(checkpoint, self.model, self.config, self.schedule)
        self.learner.restore(checkpoint)
        self.progress = Progress.of(checkpoint, self.device, self.processes.first)
        self._least_held_out = self.folder.best_loss(checkpoint.steps)
        if self.processes.first:
            self.folder.go_on_from(checkpoint.steps, path)
