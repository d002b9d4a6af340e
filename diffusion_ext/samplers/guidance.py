"""guided: a table whose rows have guidance scales of their own."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import ArrayLike

from ..checks import check_interval, kind, shown
from .step_table import StepTable, check_table


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
    check_table(table)
    scales = _scales(scale, len(table))
    if interval is not None:
        check_interval("interval", interval)
        low, high = interval
        if table.levels is None:
            raise ValueError("table: an interval wants one that knows its noise levels, got none")
        signal, sigma = table.levels[:-1].T
        scales = np.where((sigma > low * signal) & (sigma <= high * signal), scales, 1.0)
    bare = replace(table.shape, guided=False).width
    return replace(table, weights=np.column_stack([table.weights[:, :bare], scales]))


def _scales(scale, rows: int) -> np.ndarray:
    wanted = f"a number, or one for each of the table's {rows} rows"
    try:
        scales = np.asarray(scale)
    except (TypeError, ValueError) as error:
        raise TypeError(f"scale: wanted {wanted}: {error}") from error
    if scales.dtype.kind not in "iuf":
        raise TypeError(f"scale: wanted {wanted}, got {kind(scale)}")
    if scales.shape not in ((), (rows,)):
        raise ValueError(f"scale: wanted {wanted}, got shape {list(scales.shape)}")
    if not np.isfinite(scales).all():
        raise ValueError(f"scale: wanted finite numbers, got {shown(scale)}")
    return np.broadcast_to(scales.astype(np.float64), rows)
