"""Curves of a run, as pictures."""

from __future__ import annotations

from collections.abc import Sequence
from math import isnan
from pathlib import Path

INKS = ("#3465a4", "#cc7a00")


def save_loss_curve(
    path: str | Path, losses: Sequence[float], held_out: Sequence[float] = ()
) -> None:
    """The mean loss of each epoch as a PNG, beside that of the images held out, where it was
    measured: it is NaN elsewhere.

    Raises: ImportError where matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "the loss curve wants matplotlib: pip install 'diffusion_ext[demo]'"
        ) from error
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for values, label, ink in zip((losses, held_out), ("training", "held out"), INKS, strict=True):
        points = [(epoch, value) for epoch, value in enumerate(values, 1) if not isnan(value)]
        if points:
            axes.plot(*zip(*points, strict=True), color=ink, linewidth=1.8, label=label)
    if held_out:
        axes.legend(frameon=False)
    axes.set_ylim(bottom=0)
    axes.set(xlabel="epoch", ylabel="mean loss", title="Training loss")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
