"""The folder of a run: its configuration, its checkpoints, its log, its pictures."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from .checkpoints import Checkpoint, save_checkpoint, write_whole

CHECKPOINT_NAME, BEST_NAME, CONFIG_NAME = (
    "checkpoint.safetensors", "best.safetensors", "config.json",
)  # fmt: skip
EARLIER = "checkpoint-{:08d}.safetensors"  # by the steps of the run


class RunFolder:
    """The files of a run.

    config.json, checkpoint.safetensors (the last), checkpoint-<step>.safetensors (those before),
    best.safetensors, log.csv, tensorboard/, samples/.

    Args: keep: how many of the last checkpoints stay.
    """

    def __init__(self, path: str | Path, keep: int = 1):
        self.path, self.keep = Path(path), keep
        self.checkpoint = self.path / CHECKPOINT_NAME
        self.best = self.path / BEST_NAME
        self._step: int | None = None  # of the last checkpoint

    def write_config(self, config: dict) -> None:
        """What the run is made of, for people to read; checkpoints hold it too."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_whole(self.path / CONFIG_NAME, json.dumps(config, indent=2).encode())

    def went_on_from(self, step: int) -> None:
        """The last checkpoint is of this step."""
        self._step = step

    def save(self, checkpoint: Checkpoint, best: bool = False) -> None:
        """The last checkpoint, and where it is the best, the best as well."""
        self.path.mkdir(parents=True, exist_ok=True)
        if self.keep > 1 and self._step is not None and self._step != checkpoint.steps:
            _link(self.checkpoint, self.path / EARLIER.format(self._step))
        save_checkpoint(checkpoint, self.checkpoint)
        self._step = checkpoint.steps
        earlier = sorted(self.path.glob(EARLIER.format(0).replace("0" * 8, "*")))
        for old in earlier[: max(len(earlier) - (self.keep - 1), 0)]:
            old.unlink()
        if best:
            _link(self.checkpoint, self.best)

    def picture(self, epoch: int) -> Path:
        """Where the samples after an epoch go."""
        folder = self.path / "samples"
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"epoch-{epoch:04d}.png"


def _link(file: Path, name: Path) -> None:
    """A second name of a file, which later replacements of the first leave as it is."""
    temporary = name.with_name(name.name + ".tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(file, temporary)
    except OSError:  # some file systems have no second names
        shutil.copyfile(file, temporary)
    os.replace(temporary, name)
