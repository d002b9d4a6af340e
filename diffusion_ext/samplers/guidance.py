"""guided: a table whose rows have guidance scales of their own."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import ArrayLike

from ..checks import check_interval
from .step_table import StepTable


def guided(
    table: StepTable, scale: ArrayLike, interval: tuple[float, float] | None = None
) -> StepTable:
    """A table with a guidance scale for each row, for instance only within an interval of noise.

    Guidance at high noise costs variety and at low noise has no effect (Kynkäänniemi et al. 2024).
    A row of scale 1 calls the model with the context only: half the work.

    Args:
        table: of any sampler. `sample` is then given a context, and no guidance_scale.
        scale: w of m = m_0 + w·(m_c - m_0), a number, or one for each row: floats [n].
        interval: (low, high): rows whose sample has low < sigma/signal <= high keep the scale, the
            others have 1. None keeps all.

    Returns: StepTable. Raises: TypeError, ValueError.
    """
    if not isinstance(table, StepTable):
        raise TypeError(f"table: wanted a StepTable (from ddim, ddpm), got {type(table).__name__}")
    scales = _scales(scale, len(table))
    if interval is not None:
        check_interval("interval", interval)
        low, high = interval
        if table.levels is None:
            raise ValueError("interval: wanted a table that knows its noise levels")
        signal, sigma = table.levels[:-1].T
        scales = np.where((sigma > low * signal) & (sigma <= high * signal), scales, 1.0)
    bare = replace(table.shape, guided=False).width
    return replace(table, weights=np.column_stack([table.weights[:, :bare], scales]))


def _scales(scale, rows: int) -> np.ndarray:
    try:
        scales = np.asarray(scale)
    except (TypeError, ValueError) as error:
        raise TypeError(f"scale: wanted a number or {rows}: {error}") from error
    if scales.dtype.kind not in "iuf":
        raise TypeError(f"scale: wanted a number or {rows}, got {type(scale).__name__}")
    if scales.shape not in ((), (rows,)):
        raise ValueError(f"scale: wanted a number or {rows}, got shape {list(scales.shape)}")
    if not np.isfinite(scales).all():
        raise ValueError(f"scale: wanted finite numbers, got {scale}")
    return np.broadcast_to(scales.astype(np.float64), rows)
