"""Value ranges: which numbers of the data stand for black and which for white."""

from __future__ import annotations

import numpy as np

AUTO = "auto"
OF_INTEGERS = ((0, 255), (0, 65535))
OF_FLOATS = ((0, 1), (-1, 1), (0, 255))
FILLED = 0.75  # of a range, which values have to reach for it to be recognised as theirs
ROUNDING = 1e-5  # of a range, that values may lie beyond it


def parse_range(text: str) -> tuple[float, float] | None:
    """ "LOW,HIGH" as numbers; None for "auto". Raises: ValueError for anything else."""
    if text == AUTO:
        return None
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        low = high = np.nan
    if not (np.isfinite([low, high]).all() and low < high):
        raise ValueError(f'range: wanted "auto" or "LOW,HIGH" such as "0,255", got {text!r}')
    return low, high


def recognised_range(values: np.ndarray) -> tuple[float, float]:
    """What is black and what is white in values of any shape.

    uint8 is 0 to 255 and bool 0 to 1. Of others, that range of OF_INTEGERS or OF_FLOATS which they
    lie in and fill. Raises: ValueError, which asks for it, where there is none.
    """
    if values.dtype == np.uint8:
        return 0, 255
    if values.dtype == np.bool_:
        return 0, 1
    least, most = values.min(), values.max()
    if np.isnan(most):
        raise ValueError("range: wanted numbers, got NaN among the values")
    candidates = OF_INTEGERS if np.issubdtype(values.dtype, np.integer) else OF_FLOATS
    for low, high in candidates:
        inside = low <= least and most <= high
        fills = most >= low + FILLED * (high - low) and (low == 0 or least <= FILLED * low)
        if inside and fills:
            return low, high
    raise ValueError(
        f"range: {values.dtype} values from {least:g} to {most:g} do not tell which of them are "
        'black and white: say so by "0,1", "-1,1", "0,255" or any other "LOW,HIGH"'
    )


def to_unit_range(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """low..high -> float32 -1..1. Raises: ValueError for values that lie outside, or are NaN."""
    beyond = ROUNDING * (high - low)
    least, most = values.min(), values.max()
    if not (least >= low - beyond and most <= high + beyond):
        raise ValueError(
            f"range: wanted values from {low:g} to {high:g}, got {least:g} to {most:g}"
        )
    unit = (values.astype(np.float32) - np.float32(low)) / np.float32((high - low) / 2) - 1
    return unit.clip(-1, 1)


def described(values: np.ndarray, low: float, high: float) -> str:
    """What was taken, for people to read."""
    seen = f"{values.dtype} values from {values.min():g} to {values.max():g}"
    return f"{seen}; black is taken as {low:g}, white as {high:g}"
