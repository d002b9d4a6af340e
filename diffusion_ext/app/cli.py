"""The command line: diffusion-ext demo | train | sample | export | info.

Each command is a dataclass whose fields are its options.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from ..nn import ContextUnet
from ..samplers import NoiseSchedule
from ..sampling.pictures import save_loss_curve
from ..training import (
    CHECKPOINT_NAME,
    StateDictOptions,
    Trainer,
    TrainingConfig,
    load_data,
    load_trained,
    save_state_dict,
)
from .information import info
from .places import device_of, file_of
from .recognition import recognise_digits
from .sample import Sample

USER_ERRORS = (ValueError, TypeError, OSError, ImportError, FloatingPointError)


@dataclass(frozen=True)
class Train:
    """Train a ContextUnet on images, and draw the loss curve."""

    data: str = "digits"
    """"digits" (scikit-learn's), a folder of images (a sub-folder is a class), an .npy or .npz"""
    out: Path = Path("runs/digits")
    """folder for the checkpoint and the loss curve"""
    size: int = 32
    """side that a folder's images are resized to, a multiple of 4"""
    labels: Path | None = None
    """an .npy of labels or context vectors for an .npy of images"""
    layout: Literal["auto", "NHWC", "NCHW"] = "auto"
    """the order of an array's axes"""
    value_range: Annotated[str, tyro.conf.arg(name="range")] = "auto"
    """black and white of an array's numbers, or of pictures of numbers (16 bits, floats): "0,1",
    "-1,1", "0,255" or any "LOW,HIGH"; auto takes what the values tell, and says so"""
    background: str = "white"
    """colour that a folder's transparent pixels are laid over"""
    skip_unreadable: bool = False
    """leave out a folder's files that cannot be read, and name them"""
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
    device: str = "auto"
    """torch device; auto is CUDA where there is one"""

    def run(self) -> None:
        data = load_data(
            self.data, self.size, self.labels, self.layout,
            self.value_range, self.background, self.skip_unreadable,
        )  # fmt: skip
        for note in data.notes:
            print(note)
        _, channels, height, _ = data.images.shape
        torch.manual_seed(self.training.seed)  # of the initial weights
        model = self._model(channels, data.contexts.shape[1], height)
        schedule = getattr(NoiseSchedule, self.schedule)(self.timesteps)
        device = device_of(self.device)
        trainer = Trainer(model, schedule, data, self.out, self.training, device)
        print(f"training on {len(data)} images {channels}x{height}x{height}, on {device}")
        losses = trainer.fit(resume=self.resume)
        print(f"checkpoint  {trainer.checkpoint_path}")
        try:
            save_loss_curve(self.out / "loss.png", losses)
            print(f"loss curve  {self.out / 'loss.png'}")
        except ImportError as error:
            print(error)

    def _model(self, channels: int, contexts: int, height: int) -> ContextUnet:
        quirks = {"shortcut": self.shortcut, "pool_window": self.pool_window}
        if self.init_from is None:
            return ContextUnet(channels, self.n_feat, contexts, height, norm=self.norm, **quirks)
        model = load_trained(file_of(self.init_from), StateDictOptions(**quirks)).model
        print(f"weights     {self.init_from}")
        return model


@dataclass(frozen=True)
class Export:
    """Write a checkpoint's averaged weights as a state dict alone, for other code."""

    checkpoint: Path = Path("runs/digits")
    """a checkpoint, or the folder of one"""
    out: Path = Path("model.pth")
    """a .pth, .pt or .safetensors file; the course's notebook loads what --norm batch trained"""

    def run(self) -> None:
        model = load_trained(file_of(self.checkpoint)).model
        save_state_dict(model, self.out)
        options = ", ".join(f"{name}={value!r}" for name, value in model.configuration.items())
        print(f"state dict  {self.out}, of ContextUnet({options})")


@dataclass(frozen=True)
class Demo:
    """Train on real handwritten digits, sample them, and count how many are recognised."""

    out: Path = Path("runs/demo")
    """folder for the checkpoint and the pictures; a checkpoint there is replaced"""
    epochs: int = 60
    """passes over the 1797 digits"""
    per_class: int = 20
    """samples of each digit"""
    steps: int = 50
    """steps of ddim"""
    eta: float = 1.0
    """noise of ddim; 1 gives cleaner digits than 0"""
    guidance: float = 2.0
    """classifier-free guidance scale"""
    seed: int = 0
    """of the training and the samples"""

    def run(self) -> None:
        start = time.perf_counter()
        (self.out / CHECKPOINT_NAME).unlink(missing_ok=True)
        training = TrainingConfig(
            epochs=self.epochs, batch_size=64, checkpoint_every=5, seed=self.seed
        )
        Train(data="digits", out=self.out, n_feat=32, training=training).run()
        images, labels = Sample(
            checkpoint=self.out,
            per_class=self.per_class,
            steps=self.steps,
            eta=self.eta,
            guidance=self.guidance,
            seed=self.seed,
        ).draw()
        shares = recognise_digits(images, labels)
        print(
            f"recognised  {shares.generated:.1%} of {len(images)} generated digits as the digit "
            f"asked for, by a classifier of {shares.held_out:.1%} on held-out real digits"
        )
        print(f"time        {time.perf_counter() - start:.0f} s")


@dataclass(frozen=True)
class Info:
    """Print what was built, which backend serves each op, and why anything is missing."""

    def run(self) -> None:
        print(info())


Command = (
    Annotated[Demo, tyro.conf.subcommand("demo")]
    | Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Sample, tyro.conf.subcommand("sample")]
    | Annotated[Export, tyro.conf.subcommand("export")]
    | Annotated[Info, tyro.conf.subcommand("info")]
)


def main(args: Sequence[str] | None = None) -> int:
    """Runs a command. Returns the exit status: 2 for what the user can put right."""
    try:
        tyro.cli(Command, prog="diffusion-ext", args=args).run()
    except USER_ERRORS as error:
        print(f"diffusion-ext: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("diffusion-ext: interrupted; the last checkpoint is whole", file=sys.stderr)
        return 130
    return 0
