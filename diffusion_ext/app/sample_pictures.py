"""The pictures of `sample`: a grid, the denoising as an animation, and as a page's player."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..samplers import StepTable
from ..sampling import SampleResult
from ..sampling.pictures import sample_grid, save_denoising_animation
from .player import player

UNLABELLED_COLUMNS = 10
ANIMATED_PER_CLASS, ANIMATED_FRAMES = 3, 25
PLAYED_FRAMES, PLAYED_NUMBERS = 60, 8_000_000  # at most; a number of a picture is a byte or so


def save_pictures(
    folder: Path, result: SampleResult, table: StepTable, names: Sequence[str], per_class: int
) -> str:
    """Writes samples.png and denoising.gif and says so. Returns the player.

    Args: names: of the classes, of which the result has per_class samples each, in order; empty
    where there are none.
    """
    folder.mkdir(parents=True, exist_ok=True)
    columns = per_class if names else min(per_class, UNLABELLED_COLUMNS)
    sample_grid(result.images, columns, row_labels=names).save(folder / "samples.png")
    print(f"samples     {folder / 'samples.png'}")
    timesteps = _reached(result, table)
    _save_animation(folder / "denoising.gif", result, timesteps, names, per_class)
    return _player(result, timesteps, names, per_class)


def _reached(result: SampleResult, table: StepTable) -> list[int]:
    """Where each frame is: one kept after the step at timestep t is at the next timestep, or clean
    at the end."""
    reached = dict(zip(table.timesteps, [*table.timesteps[1:], 0], strict=True))
    return [int(reached[t]) for t in result.frame_timesteps]


def _save_animation(
    path: Path, result: SampleResult, timesteps: list[int], names: Sequence[str], per_class: int
) -> None:
    """A column for each class, a few samples of each below one another."""
    shown = _spread(len(timesteps), ANIMATED_FRAMES)
    frames, columns = result.frames[shown], min(per_class, UNLABELLED_COLUMNS)
    if names:
        by_class = frames.unflatten(1, (len(names), per_class))[:, :, :ANIMATED_PER_CLASS]
        frames, columns = by_class.transpose(1, 2).flatten(1, 2), len(names)
    save_denoising_animation(path, frames, [timesteps[i] for i in shown], columns, names)
    print(f"denoising   {path}")


def _player(
    result: SampleResult, timesteps: list[int], names: Sequence[str], per_class: int
) -> str:
    """A row for each class, with as many samples as the page can hold."""
    shown = _spread(len(timesteps), PLAYED_FRAMES)
    frames, rows = result.frames[shown], max(len(names), 1)
    numbers = frames[:, :rows].numel()  # of one sample of each class
    columns = max(1, min(per_class, PLAYED_NUMBERS // numbers))
    frames = frames.unflatten(1, (rows, -1))[:, :, :columns].flatten(1, 2)
    if not names:
        columns = min(columns, UNLABELLED_COLUMNS)
    return player(frames, [timesteps[i] for i in shown], columns, names)


def _spread(count: int, most: int) -> np.ndarray:
    """At most so many of a number of frames, the last one among them."""
    return np.unique(np.linspace(0, count - 1, most).round().astype(int))
