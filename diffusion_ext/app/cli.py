"""The command line: diffusion-ext demo | train | sample | evaluate | export | bench | info |
completion.

Each command is a dataclass whose fields are its options.
"""

from __future__ import annotations

import functools
import io
import json
import operator
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ..nn.state_sizes import call_of
from ..training import CHECKPOINT_NAME, load_trained, save_state_dict
from ..training.torchrun import told_to_torchrun
from ..training.weights_files import file_of
from .bench.command import Bench
from .demo_page import write_demo
from .evaluate import Evaluate
from .information import info
from .page import show
from .places import RUN, RunPath
from .recognition import recognise_digits
from .sample import Sample
from .spelling import as_today, check_names
from .train import Train

PROGRAM = "diffusion-ext"
EXPORTED_NAME = "model.safetensors"
USER_ERRORS = (ValueError, TypeError, OSError, ImportError, FloatingPointError)


@dataclass(frozen=True)
class Export:
    """Write a run's averaged weights alone, as a state dict for other code; `sample` and dx.load
    take it too."""

    run_folder: RunPath = RUN
    """a folder that `train` wrote, or one of its checkpoints"""
    out: Path | None = None
    """a .pth, .pt or .safetensors file, default model.safetensors in the run's folder; the course's
    notebook loads a .pth of what --norm batch trained"""

    def run(self) -> None:
        trained = load_trained(self.run_folder)
        out = self.out or file_of(self.run_folder).with_name(EXPORTED_NAME)
        save_state_dict(trained, out)
        print(f"state dict  {out}, of {call_of(trained.model.configuration)}")
        print(f"in Python   dx.load({str(out)!r})")


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
    open: bool = False
    """show the page in a browser"""

    def run(self) -> None:
        start = time.perf_counter()
        (self.out / CHECKPOINT_NAME).unlink(missing_ok=True)
        training = replace(
            Train().training, epochs=self.epochs, batch_size=64, samples_every=0, seed=self.seed
        )
        Train(out=self.out, n_feat=32, training=training).run()
        drawn = Sample(
            run_folder=self.out,
            per_class=self.per_class,
            sampler="ddim",
            clip=1.0,
            steps=self.steps,
            eta=self.eta,
            guidance=self.guidance,
            seed=self.seed,
        ).draw()
        shares = recognise_digits(drawn.images, drawn.labels)
        facts = {
            "recognised": f"{shares.generated:.1%} of {len(drawn.images)} generated digits as the "
            f"digit asked for, by a classifier of {shares.held_out:.1%} on held-out real digits",
            "time": f"{time.perf_counter() - start:.0f} s",
        }
        page = self.out / "demo.html"
        write_demo(page, drawn.player, facts, self.out / "loss.png")
        for name, fact in {**facts, "page": page}.items():
            print(f"{name:<12}{fact}")
        if self.open:
            show(page)


@dataclass(frozen=True)
class Info:
    """Print what was built, which backend serves each op, and why anything is missing."""

    json: bool = False
    """print it as JSON, for programs"""

    def run(self) -> None:
        found = info()
        print(json.dumps(asdict(found), indent=1) if self.json else found)


@dataclass(frozen=True)
class Completion:
    """Print what makes a shell complete the commands and options of diffusion-ext.

    bash: diffusion-ext completion > ~/.local/share/bash-completion/completions/diffusion-ext
    zsh: diffusion-ext completion zsh > a file _diffusion-ext in a folder of $fpath
    """

    shell: tyro.conf.Positional[Literal["bash", "zsh"]] = "bash"
    """whose completion"""

    def run(self) -> None:
        tyro.cli(Command, prog=PROGRAM, args=["--tyro-print-completion", self.shell])


COMMANDS = {
    "demo": Demo, "train": Train, "sample": Sample, "evaluate": Evaluate, "export": Export,
    "bench": Bench, "info": Info, "completion": Completion,
}  # fmt: skip
Command = functools.reduce(
    operator.or_, (Annotated[of, tyro.conf.subcommand(name)] for name, of in COMMANDS.items())
)


def main(args: Sequence[str] | None = None) -> int:
    """Runs a command. Returns the exit status: 2 for what the user can put right, 130 after Ctrl-C;
    SIGTERM ends training with 143."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a name may have letters that a console has not
    try:
        words = as_today(sys.argv[1:] if args is None else args)
        check_names(COMMANDS, words)
        command = tyro.cli(Command, prog=PROGRAM, args=words)
        if isinstance(command, Train) and command.resumes:  # what is not given is as it was
            command = tyro.cli(Command, prog=PROGRAM, args=words, default=command.recorded())
        told_to_torchrun(command.run)()
    except USER_ERRORS as error:
        print(f"diffusion-ext: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("diffusion-ext: interrupted; the last checkpoint is whole", file=sys.stderr)
        return 130
    return 0
