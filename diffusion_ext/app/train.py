"""The command `train`: a ContextUnet on images, from the start or on from a checkpoint."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import numpy as np
import torch
import tyro

from ..nn import ContextUnet
from ..samplers import NoiseSchedule
from ..training import (
    ImageData,
    LazyData,
    StateDictOptions,
    Trainer,
    TrainingConfig,
    load_checkpoint,
    load_trained,
)
from ..training.config import FREE
from ..training.plan import n_feat_for, plan_in_words
from ..training.run_folder import RunFolder
from ..training.torchrun import joined, restarted_by_torchrun
from .curves import save_loss_curve
from .data_options import DataOptions, record_of
from .places import device_of

Schedule = Literal["linear", "cosine", "course"]
TIMESTEPS = 500
KEPT = ("n_feat", "norm", "schedule", "timesteps", "shortcut", "pool_window", "device")
OF_MODEL = ("n_feat", "norm", "shortcut", "pool_window")
# What a run may go on with another value of, beside the training's FREE.
MOVABLE = {"data", "labels", "cache", "workers", "lazy", "strict", "device"}


@dataclass(frozen=True)
class Train:
    """Train a ContextUnet on images; the log, samples and the loss curve come beside it."""

    images: Annotated[DataOptions, tyro.conf.arg(name="")] = field(default_factory=DataOptions)
    out: Path | None = None
    """folder for the checkpoints, the log and the pictures; default runs/ and the data's name"""
    n_feat: int | None = None
    """channels of the network's first level, a multiple of 8; default 64, 32 for a small folder"""
    norm: Literal["batch", "group"] = "group"
    """normalisation in the network's blocks; group is fused with the activation"""
    schedule: Schedule | None = None
    """noise schedule; default cosine, with --noising course the course's, that of --init-from"""
    timesteps: int | None = None
    """noising steps T; default 500, or those of --init-from"""
    shortcut: Literal["scaled", "zero", "random"] = "scaled"
    """the first block's shortcut; zero or random fine-tune the course's networks"""
    pool_window: int | None = None
    """side of the average pooling; default the whole map, the course's networks have 4"""
    init_from: Path | None = None
    """start from the weights of a checkpoint, or of a state dict (.pth, .pt, .safetensors), whose
    sizes and norm the network then has"""
    training: Annotated[TrainingConfig, tyro.conf.arg(name="")] = field(
        default_factory=lambda: TrainingConfig(prediction=None, timestep_sampling=None)
    )
    resume: bool = False
    """continue from the checkpoint in the folder, with the options of its run"""
    resume_from: Path | None = None
    """continue from this one of the folder's checkpoints, whatever came after it"""
    device: str = "auto"
    """torch device; auto is CUDA where there is one"""

    def run(self) -> None:
        if self.resumes:
            before = self.recorded()
            self._going_on(before)._train(_changes(before, self))
        else:
            self._like_its_start()._train({})

    @property
    def resumes(self) -> bool:
        return self.resume or self.resume_from is not None

    @property
    def folder(self) -> Path:
        return self.out or Path("runs") / Path(self.images.data).stem

    def _train(self, changes: dict[str, tuple[Any, Any]]) -> None:
        """Args: changes: of a run that goes on, by the option: (before, now)."""
        device = device_of(self.device)
        with joined(device) as processes:
            with processes.first_then_others() if self.images.cache else nullcontext():
                data = self.images.load()
            trainer = self._trainer(data, device)
            if processes.first:
                told = [
                    f"{name:<12}{now}" + (f", before {was}" if was is not None else "")
                    for name, (was, now) in changes.items()
                ]
                plan = plan_in_words(self.training, trainer.config, len(trainer.images))
                print(*data.notes, *told, _described(trainer), *plan, sep="\n")
            losses = trainer.fit(resume=self._resumed(trainer))
            if processes.first:
                print(f"checkpoint  {trainer.checkpoint_path}")
                _save_curve(trainer.folder.path / "loss.png", losses, trainer.validation_losses)

    def recorded(self) -> Train:
        """The command of the run in the folder, as its config.json tells.

        Raises: FileNotFoundError, where there is none; ValueError for one that Python began.
        """
        record = record_of(self.folder, "resume")
        model = record["model"]
        known = {name: model[name] for name in OF_MODEL if name in model}
        options = record.get("options") or {"schedule": _schedule_in(self.folder)}
        return Train(
            images=DataOptions.of_record(record["data"]),
            training=TrainingConfig(**record["training"]),
            timesteps=record["timesteps"],
            **{"out": self.folder, **known, **options},
        )

    def _going_on(self, before: Train) -> Train:
        """This command, which goes on with the run of another.

        Raises: ValueError for an option that the run has to keep.
        """
        for name, (was, now) in _changes(before, self).items():
            if name not in FREE | MOVABLE:
                raise ValueError(
                    f"{name}: the run in {self.folder} has {was}, which stays, got {now}; a new "
                    "run wants a folder of its own, --out"
                )
        given = {n for n in ("steps", "epochs") if n in _changes(before, self)}
        if len(given) != 1:
            return self
        (other,) = {"steps", "epochs"} - given  # the length of before
        return replace(self, training=replace(self.training, **{other: None}))

    def _like_its_start(self) -> Train:
        """This command, with the schedule and the prediction that it leaves open.

        Raises: ValueError for a start from a network with a schedule of its own.
        """
        training, schedule, timesteps = self.training, self.schedule, self.timesteps
        if self.init_from is not None:
            start = load_trained(self.init_from, self._quirks)
            training = replace(training, prediction=training.prediction or start.prediction)
            schedule = schedule or _name_of(start.schedule)
            timesteps = timesteps or start.schedule.timesteps
        usual = "course" if training.noising == "course" else "cosine"
        return replace(
            self,
            training=training,
            schedule=schedule or usual,
            timesteps=timesteps or TIMESTEPS,
        )

    @property
    def _quirks(self) -> StateDictOptions:
        return StateDictOptions(shortcut=self.shortcut, pool_window=self.pool_window)

    def _trainer(self, data: ImageData | LazyData, device: torch.device) -> Trainer:
        torch.manual_seed(self.training.seed)  # of the initial weights
        model = self._model(data)
        schedule = getattr(NoiseSchedule, self.schedule)(self.timesteps)
        about = {
            "data": self.images.record(),
            "options": {"schedule": self.schedule, "device": self.device},
        }
        return Trainer(model, schedule, data, self.folder, self.training, device, about=about)

    def _resumed(self, trainer: Trainer) -> bool | Path:
        """What fit is to go on from: after a failure torchrun starts the same command again."""
        again = restarted_by_torchrun() and trainer.folder.last_checkpoint() is not None
        return again or self.resume_from or self.resume

    def _model(self, data: ImageData | LazyData) -> ContextUnet:
        if self.init_from is None:
            quirks = {"shortcut": self.shortcut, "pool_window": self.pool_window}
            channels, height, _ = data.shape
            contexts = (data.context_shape or (1,))[0]
            n_feat = self.n_feat or n_feat_for(len(data))
            return ContextUnet(channels, n_feat, contexts, height, norm=self.norm, **quirks)
        model = load_trained(self.init_from, self._quirks).model
        print(f"weights     {self.init_from}")
        return model


def _name_of(schedule: NoiseSchedule) -> str:
    for name in get_args(Schedule):
        named = getattr(NoiseSchedule, name)(schedule.timesteps)
        if np.array_equal(named.alpha_bar, schedule.alpha_bar):
            return name
    raise ValueError(
        f"schedule: wanted one of {', '.join(get_args(Schedule))}; the network has one of its own"
    )


def _schedule_in(folder: Path) -> str:
    """Of a run whose config.json does not tell it, as those of earlier versions do not."""
    last = RunFolder(folder).last_checkpoint()
    if last is None or last.is_dir():
        return "linear"  # that version's default
    return _name_of(load_checkpoint(last).schedule)


def _changes(before: Train, now: Train) -> dict[str, tuple[Any, Any]]:
    """The options that differ, by name: (before, now)."""
    groups = [(before.images.record(), now.images.record())]
    groups += [(asdict(before.training), asdict(now.training))]
    groups += [tuple({n: getattr(c, n) for n in KEPT} for c in (before, now))]
    return {n: (a[n], b[n]) for a, b in groups for n in a if a[n] != b[n]}


def _described(run: Trainer) -> str:
    """What is trained on what, as a line."""
    held_out = len(run.data) - len(run.images)
    rest = f" and {held_out} held out" if held_out else ""
    count = run.processes.count
    where = f"on {run.device}" + (f", in {count} processes" if count > 1 else "")
    size = "x".join(map(str, run.data.shape))
    return f"training on {len(run.images)} images {size}{rest}, {where}"


def _save_curve(path: Path, losses: list[float], validation_losses: list[float]) -> None:
    try:
        save_loss_curve(path, losses, validation_losses)
        print(f"loss curve  {path}")
    except ImportError as error:
        print(error)
