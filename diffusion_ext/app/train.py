"""The command `train`: a ContextUnet on images."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

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
    load_data,
    load_trained,
)
from ..training.torchrun import joined, restarted_by_torchrun
from .curves import save_loss_curve
from .places import device_of


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


@dataclass(frozen=True)
class Train:
    """Train a ContextUnet on images; the log, samples and the loss curve come beside it."""

    images: Annotated[DataOptions, tyro.conf.arg(name="")] = field(default_factory=DataOptions)
    out: Path | None = None
    """folder for the checkpoints, the log and the pictures; default runs/ and the data's name"""
    n_feat: int = 64
    """channels of the network's first level, a multiple of 8"""
    norm: Literal["batch", "group"] = "group"
    """normalisation in the network's blocks; group is fused with the activation"""
    schedule: Literal["linear", "cosine", "course"] = "linear"
    """noise schedule"""
    timesteps: int = 500
    """noising steps T"""
    shortcut: Literal["scaled", "zero", "random"] = "scaled"
    """the first block's shortcut; zero or random fine-tune the course's networks"""
    pool_window: int | None = None
    """side of the average pooling; default the whole map, the course's networks have 4"""
    init_from: Path | None = None
    """start from the weights of a checkpoint, or of a state dict (.pth, .pt, .safetensors), whose
    sizes and norm the network then has"""
    training: Annotated[TrainingConfig, tyro.conf.arg(name="")] = field(
        default_factory=TrainingConfig
    )
    resume: bool = False
    """continue from the checkpoint in the folder"""
    resume_from: Path | None = None
    """continue from this one of the folder's checkpoints, whatever came after it"""
    device: str = "auto"
    """torch device; auto is CUDA where there is one"""

    def run(self) -> None:
        device = device_of(self.device)
        with joined(device) as processes:
            with processes.first_then_others() if self.images.cache else nullcontext():
                data = self.images.load()
            if processes.first:
                print(*data.notes, sep="\n", end="\n" * bool(data.notes))
            trainer = self._trainer(data, device)
            if processes.first:
                print(_described(trainer))
            losses = trainer.fit(resume=self._resumed(trainer))
            if processes.first:
                print(f"checkpoint  {trainer.checkpoint_path}")
                _save_curve(trainer.folder.path / "loss.png", losses, trainer.validation_losses)

    def _trainer(self, data: ImageData | LazyData, device: torch.device) -> Trainer:
        channels, height, _ = data.shape
        torch.manual_seed(self.training.seed)  # of the initial weights
        model = self._model(channels, (data.context_shape or (1,))[0], height)
        schedule = getattr(NoiseSchedule, self.schedule)(self.timesteps)
        out = self.out or Path("runs") / Path(self.images.data).stem
        about = {"data": self.images.record()}
        return Trainer(model, schedule, data, out, self.training, device, about=about)

    def _resumed(self, trainer: Trainer) -> bool | Path:
        """What fit is to go on from: after a failure torchrun starts the same command again."""
        again = restarted_by_torchrun() and trainer.folder.last_checkpoint() is not None
        return again or self.resume_from or self.resume

    def _model(self, channels: int, contexts: int, height: int) -> ContextUnet:
        quirks = {"shortcut": self.shortcut, "pool_window": self.pool_window}
        if self.init_from is None:
            return ContextUnet(channels, self.n_feat, contexts, height, norm=self.norm, **quirks)
        model = load_trained(self.init_from, StateDictOptions(**quirks)).model
        print(f"weights     {self.init_from}")
        return model


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
