"""The folder of a run: its configuration, its checkpoints, its log, its pictures."""

from __future__ import annotations

import io
import json
import math
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

from .checkpoints import Checkpoint, load_checkpoint, save_checkpoint, write_whole
from .held_files import patiently
from .processes import Processes
from .sharded_checkpoints import SHARDED, load_sharded, save_sharded, sharded_checkpoints
from .weights_files import CHECKPOINT_NAME, is_weights

BEST_NAME = "best.safetensors"
CONFIG_NAME = "config.json"
EARLIER = "checkpoint-{:08d}.safetensors"  # by the steps of the run


class RunFolder:
    """The files of a run.

    config.json, checkpoint.safetensors (the last), checkpoint-<step>.safetensors (those before),
    best.safetensors, sharded-<step>/ (of a cut network, until the run has ended), log.csv,
    tensorboard/, samples/; .lock and .lock-holder, while a run is at it.

    Args: keep: how many of the last checkpoints stay. Raises: ValueError where it is a file.
    """

    def __init__(self, path: str | Path, keep: int = 1):
        self.path, self.keep = Path(path), keep
        if self.path.is_file():
            raise ValueError(
                f"folder: wanted a run's, got the file {path}; did you mean {self.path.parent}?"
            )
        self.checkpoint = self.path / CHECKPOINT_NAME
        self.best = self.path / BEST_NAME
        self._step: int | None = None  # of the last checkpoint
        self._config: dict = {}

    def write_config(self, config: dict) -> None:
        """What the run is made of, for people to read; checkpoints hold it too."""
        self._config = config
        self.path.mkdir(parents=True, exist_ok=True)
        write_whole(self.path / CONFIG_NAME, json.dumps(config, indent=2).encode())

    def config(self) -> dict:
        """What config.json tells; {} where there is none."""
        try:
            return json.loads((self.path / CONFIG_NAME).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}

    def best_loss(self, step: int) -> float:
        """On the images held out, of best.safetensors; infinite where there is none, or one of a
        later step than this."""
        try:
            best = load_checkpoint(self.best)
        except (OSError, ValueError):
            return math.inf
        known = best.validation_losses and best.steps <= step
        return best.validation_losses[-1] if known else math.inf

    def last_checkpoint(self) -> Path | None:
        """A file, or the folder of a cut network's, which is there until the run has ended."""
        cut = sharded_checkpoints(self.path)
        return cut[-1] if cut else self.checkpoint if self.checkpoint.exists() else None

    def load(self, like: Callable, path: Path | None = None) -> Checkpoint:
        """The last checkpoint, or another of this run. Args: like: see `load_sharded`.

        Raises: FileNotFoundError; ValueError, which names the one before where there is one.
        """
        path = path or self.last_checkpoint() or self.checkpoint
        try:
            cut = path.is_dir() and not is_weights(path)
            return load_sharded(path, like) if cut else load_checkpoint(path)
        except ValueError as error:
            others = [*sharded_checkpoints(self.path)[::-1], *self._earlier()[::-1], self.best]
            offered = [other for other in others if other != path and _is_whole(other)]
            hint = f"; the one before it is {offered[0]}: resume from it" if offered else ""
            raise ValueError(f"{error}{hint}") from error

    def go_on_from(self, step: int, path: Path | None = None) -> None:
        """The last checkpoint is of this step; path: where the user said so. What came after it is
        set aside, and a file is then checkpoint.safetensors."""
        self._step = step
        if path is None:
            return
        for cut in sharded_checkpoints(self.path):
            if cut.name > SHARDED.format(step):
                aside = cut.with_name(f"replaced-{cut.name}")
                if aside.exists():
                    patiently(shutil.rmtree, aside)
                patiently(os.replace, cut, aside)
        if not path.is_dir() and path.resolve() != self.checkpoint.resolve():
            self.path.mkdir(parents=True, exist_ok=True)
            if self.checkpoint.exists():
                aside = self.checkpoint.with_suffix(".replaced")
                patiently(os.replace, self.checkpoint, aside)
            _link(path, self.checkpoint)

    def save(self, checkpoint: Checkpoint, best: bool = False) -> None:
        """The last checkpoint, and where it is the best, the best as well. A folder that vanished
        is made anew.

        Raises: OSError where it cannot be written, telling what is left.
        """
        with self._telling_what_is_left(checkpoint.steps):
            if self.keep > 1 and self._step not in (None, checkpoint.steps):
                self._keep_last()
            save_checkpoint(checkpoint, self.checkpoint)
            self._step = checkpoint.steps
            for old in self._earlier(checkpoint.steps)[: 1 - self.keep or None]:
                patiently(old.unlink)
            if best:
                _link(self.checkpoint, self.best)
            for cut in sharded_checkpoints(self.path):  # the run has ended: this one has it all
                patiently(shutil.rmtree, cut)

    def save_sharded(self, checkpoint: Checkpoint, processes: Processes) -> None:
        """`save` of a cut network: every process writes its part."""
        with self._telling_what_is_left(checkpoint.steps):
            save_sharded(checkpoint, self.path, self.keep, processes)
            self._step = checkpoint.steps

    @contextmanager
    def _telling_what_is_left(self, step: int) -> Iterator[None]:
        try:
            if self._config and not (self.path / CONFIG_NAME).exists():
                self.write_config(self._config)
            yield
        except OSError as error:
            raise type(error)(
                error.errno,
                f"checkpoint: step {step} cannot be written to {self.path} "
                f"({error.strerror or error}). {self.last()}",
            ) from error

    def last(self) -> str:
        """What there is to go back to, as a sentence."""
        path = self.last_checkpoint()
        if self._step is None or path is None:
            return "There is no checkpoint yet."
        return f"The last good checkpoint, of step {self._step}, is {path}."

    def _earlier(self, step: int = 10**8) -> list[Path]:
        """The checkpoints before a step that have names of their own, in the order of theirs."""
        found = sorted(self.path.glob(EARLIER.format(0).replace("0" * 8, "*")))
        return [path for path in found if path.name < EARLIER.format(step)]

    def _keep_last(self) -> None:
        """The last checkpoint gets a name of its own."""
        if self.checkpoint.exists():
            _link(self.checkpoint, self.path / EARLIER.format(self._step))

    def save_picture(self, picture: Image.Image, step: int) -> None:
        """The samples after a step; one that cannot be written is a warning: the weights matter
        more."""
        content, path = io.BytesIO(), self.path / "samples" / f"step-{step:06d}.png"
        picture.save(content, "PNG")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, content.getvalue())
        except OSError as error:
            warnings.warn(f"samples: {path} cannot be written: {error}", stacklevel=3)


def _is_whole(path: Path) -> bool:
    if path.is_dir():
        return True  # as far as one process can tell
    try:
        load_checkpoint(path)
    except (ValueError, OSError):
        return False
    return True


def _link(file: Path, name: Path) -> None:
    """A second name of a file, which later replacements of the first leave as it is."""
    temporary = name.with_name(name.name + ".tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(file, temporary)
    except OSError:  # some file systems have no second names
        shutil.copyfile(file, temporary)
    patiently(os.replace, temporary, name)
