"""The file of a run's weights, which may be named by the run's folder, and what else is near."""

from __future__ import annotations

import os
from pathlib import Path

from ..checks import did_you_mean, shown

CHECKPOINT_NAME = "checkpoint.safetensors"
SUFFIXES = (".pt", ".pth", ".safetensors")  # of weights alone; checkpoints have the last one
RUNS = Path("runs")  # where the command line puts them
MOST_LISTED = 10


def file_of(path: str | Path) -> Path:
    """The file of a run's weights.

    Args: path: the folder of a run, or a file itself.
    Raises: TypeError; FileNotFoundError, which names the run or the file that may have been meant.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"run: wanted the path of a run or of weights, got {shown(path)}")
    path = Path(path)
    if is_weights(path):
        return _named_by(path)
    if path.name == CHECKPOINT_NAME:  # whoever names it means the run
        path = path.parent
    what = f"no {CHECKPOINT_NAME} in {path}" if path.is_dir() else f"no file or folder {path}"
    inside = _runs_in(path)
    hint = "" if inside else did_you_mean(path.name, weights_near(path))
    raise FileNotFoundError(f"run: {what}{hint or _listed(inside or _runs_in(RUNS))}")


def is_weights(path: str | Path) -> bool:
    """Whether it is a run's folder with a checkpoint, or a file."""
    return _named_by(Path(path)).is_file()


def _named_by(path: Path) -> Path:
    return path / CHECKPOINT_NAME if path.is_dir() else path


def weights_near(path: Path) -> dict[str, Path]:
    """Runs, and files of weights, by their names: those in `runs` and those beside a path."""
    near = {run.name: run for run in [*_runs_in(RUNS), *_runs_in(path.parent)]}
    return near | {f.name: f for f in _entries(path.parent) if f.suffix in SUFFIXES}


def _listed(runs: list[Path]) -> str:
    """The end of a message that there is no such run."""
    if not runs:
        return "; `diffusion-ext train` writes one: name the folder of its run, such as runs/digits"
    return f"; there are {', '.join(sorted(map(str, runs))[:MOST_LISTED])}"


def _runs_in(folder: Path) -> list[Path]:
    return [entry for entry in _entries(folder) if entry.is_dir() and is_weights(entry)]


def _entries(folder: Path) -> list[Path]:
    """What is in a folder; nothing, where that cannot be told."""
    try:
        return [folder / name for name in os.listdir(folder)]
    except OSError:
        return []
