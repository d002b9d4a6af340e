"""The command line: diffusion-ext demo | train | sample | evaluate | export | info.

Each command is a dataclass whose fields are its options.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from ..training import CHECKPOINT_NAME, TrainingConfig, load_trained, save_state_dict
from ..training.torchrun import told_to_torchrun
from .evaluate import Evaluate
from .information import info
from .places import file_of
from .recognition import recognise_digits
from .sample import Sample
from .train import Train

USER_ERRORS = (ValueError, TypeError, OSError, ImportError, FloatingPointError)


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
        Train(out=self.out, n_feat=32, training=training).run()
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
    | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
    | Annotated[Export, tyro.conf.subcommand("export")]
    | Annotated[Info, tyro.conf.subcommand("info")]
)


def main(args: Sequence[str] | None = None) -> int:
    """Runs a command. Returns the exit status: 2 for what the user can put right, 130 after Ctrl-C;
    SIGTERM ends training with 143."""
    try:
        command = tyro.cli(Command, prog="diffusion-ext", args=args)
        told_to_torchrun(command.run)()
    except USER_ERRORS as error:
        print(f"diffusion-ext: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("diffusion-ext: interrupted; the last checkpoint is whole", file=sys.stderr)
        return 130
    return 0
